"""Geometries of class means and head that the literature compares with."""

import torch


def self_duality(class_counts):
    """Return the D (K, K) of the paper's self-duality W ~ D H^T: rows K sqrt(n_k) h_k - sum_m sqrt(n_m) h_m."""
    roots = torch.as_tensor(class_counts, dtype=torch.float64).sqrt()
    return len(roots) * roots.diag() - roots


def seli(class_counts):
    """Return H^T H and W W^T (K, K) of SELI, the geometry of imbalanced classes without ReLU, each up to a factor.

    Thrampoulidis, Kini, Vakilian, Behnia (2022), definition 2: with the simplex-encoding label matrix
    Z = (I - 11^T/K) Y (K, N), Y one-hot, and its SVD Z = V S U^T, the features have the Gram matrix U S U^T, and
    W W^T = V S V^T. Eigenvectors of K x K matrices give the same: with D = diag(n), the class means have
    H^T H = D^(-1/2) (D^(1/2) (I - 11^T/K) D^(1/2))^(1/2) D^(-1/2), and W W^T = ((I - 11^T/K) D (I - 11^T/K))^(1/2).
    """
    roots = torch.as_tensor(class_counts, dtype=torch.float64).cpu().sqrt()
    centring = torch.eye(len(roots), dtype=torch.float64) - 1 / len(roots)
    gram = square_root(roots[:, None] * centring * roots) / roots[:, None] / roots
    return gram, square_root(centring * roots.square() @ centring)


def square_root(matrix):
    """Return the square root (K, K) of a symmetric positive semidefinite matrix (K, K), which may be singular.

    LAPACK returns an eigenvalue of zero as a number of about K eps times the largest one, of either sign, whose root
    would be an error of sqrt(eps). Eigenvalues below K eps times the largest are therefore taken as zero.
    """
    values, vectors = torch.linalg.eigh(matrix)
    zero = len(values) * torch.finfo(values.dtype).eps * values[-1]
    return vectors * torch.where(values > zero, values, 0).sqrt() @ vectors.T
