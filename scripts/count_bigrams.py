"""Count which of the most frequent words of a text follows which, as a CSV file for solve_ufm.py --counts_file.

    python scripts/count_bigrams.py emma.txt persuasion.txt > bigrams.csv

results/texts/austen_bigrams.csv is from the six novels of Debian's package r-cran-janeaustenr, which R writes as text:

    Rscript -e 'for (b in data(package = "janeaustenr")$results[, "Item"]) writeLines(get(b, "package:janeaustenr"), b)'

Words are runs of letters and apostrophes, in lower case; pairs of two words are counted across lines, not across files.
"""

import argparse
import csv
import re
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

WORD = re.compile(r"[a-z']+")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("texts", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--words", type=int, default=30, help="how many of the most frequent words")
    args = parser.parse_args()
    texts = [WORD.findall(path.read_text(encoding="utf-8").lower()) for path in args.texts]
    frequent = [word for word, _ in Counter(word for text in texts for word in text).most_common(args.words)]
    pairs = Counter(pair for text in texts for pair in pairwise(text))
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["context", *frequent])
    writer.writerows([first, *(pairs[first, second] for second in frequent)] for first in frequent)


if __name__ == "__main__":
    main()
