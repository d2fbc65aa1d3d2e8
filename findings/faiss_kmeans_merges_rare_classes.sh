#!/usr/bin/env bash
# faiss-cpu 1.15.1: k-means merges the two rarest of ten classes that have collapsed, however often it starts anew.
# Guess: with ten clusters for ten different points (1000 to 10 samples) the best of a hundred starts has objective 0.
# Seen: 33333 with nredo=100, as with nredo=10: one centroid for the classes of 20 and 10 samples, and nine clusters in
# use. The centroids start at random samples, which rare classes seldom are, and a cluster without samples splits a
# large one, though its samples are equal. scikit-learn's KMeans, with k-means++, has 2e-22.
source "$(dirname "$0")/pinned.sh"
pinned faiss-cpu==1.15.1 numpy==2.4.6
check <<'CODE'
import faiss
import numpy as np

labels = np.repeat(np.arange(10), [1000, 500, 300, 200, 100, 50, 40, 30, 20, 10])
samples = 50 * np.eye(10, dtype=np.float32)[labels]
kmeans = faiss.Kmeans(10, 10, niter=100, nredo=100)
kmeans.train(samples)
clusters = kmeans.index.search(samples, 1)[1].ravel()
merged = [np.unique(labels[clusters == cluster]).tolist() for cluster in np.unique(clusters)]
print(kmeans.obj[-1], merged)
assert kmeans.obj[-1] > 3e4 and len(merged) == 9 and [8, 9] in merged
CODE
