"""Geometries of class means and head that the literature compares with."""

import math
from collections.abc import Sequence

import torch
from numpy.typing import ArrayLike

from nc_theory.problem import random_frame, validate_counts


def simplex_etf(
    num_classes: int, dim: int, non_negative: bool = True, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Return a simplex ETF (K, d): rows of norm 1 with cosines -1/(K-1), the usual fixed classifier.

    Its directions are those of `random_frame`, whose arguments these are. Raises ValueError for d < K.

    Example:
        >>> import torch
        >>> from nc_theory import simplex_etf
        >>> etf = simplex_etf(3, dim=8)
        >>> torch.allclose(etf @ etf.T, torch.eye(3, dtype=torch.float64) * 1.5 - 0.5)
        True
    """
    centring = torch.eye(num_classes, dtype=torch.float64) - 1 / num_classes
    frame = random_frame(dim, num_classes, non_negative, generator)
    return math.sqrt(num_classes / (num_classes - 1)) * centring @ frame.T


def seli(class_counts: ArrayLike, of: Sequence[str] = ("HTH", "WWT")) -> tuple[torch.Tensor, ...]:
    """Return H^T H and W W^T (K, K) of SELI, the geometry of imbalanced classes without ReLU, each up to a factor.

    of: which of them, because of 10,000 classes each takes 0.8 GB.

    Thrampoulidis, Kini, Vakilian, Behnia (2022), definition 2: with the simplex-encoding label matrix
    Z = (I - 11^T/K) Y (K, N), Y one-hot, and its SVD Z = V S U^T, the features have the Gram matrix U S U^T, and
    W W^T = V S V^T. Eigenvectors of K x K matrices give the same: with D = diag(n), the class means have
    H^T H = D^(-1/2) (D^(1/2) (I - 11^T/K) D^(1/2))^(1/2) D^(-1/2), and W W^T = ((I - 11^T/K) D (I - 11^T/K))^(1/2).

    Both matrices are unchanged if classes of equal counts are swapped. The eigenvectors that tell such classes apart
    are known, so that the eigenvalue problem is as large as the number of distinct counts, at most sqrt(2 N).

    Example:
        >>> from nc_theory import seli
        >>> gram, _ = seli([100, 100, 100])
        >>> gram / gram[0, 0]
        tensor([[ 1.0000, -0.5000, -0.5000],
                [-0.5000,  1.0000, -0.5000],
                [-0.5000, -0.5000,  1.0000]], dtype=torch.float64)
    """
    counts = validate_counts(class_counts)
    distinct, groups, sizes = counts.unique(return_inverse=True, return_counts=True)
    sizes, roots = sizes.double(), counts.sqrt()
    centring = torch.eye(len(sizes), dtype=torch.float64) - sizes.outer(sizes).sqrt() / len(counts)
    found = []
    for name in of:
        if name == "HTH":
            gram = distinct.sqrt()[:, None] * centring * distinct.sqrt()
            found.append(root_of_all_classes(gram, distinct, groups, sizes).div_(roots[:, None]).div_(roots))
        else:
            found.append(root_of_all_classes(centring * distinct @ centring, distinct, groups, sizes))
    return tuple(found)


def root_of_all_classes(
    matrix: torch.Tensor, distinct: torch.Tensor, groups: torch.Tensor, sizes: torch.Tensor
) -> torch.Tensor:
    """Return the square root (K, K) of a matrix that is known on groups of classes of equal counts.

    matrix: (G, G), its restriction to the span of the normalised indicators of the groups. Orthogonally to that span it
    multiplies by the count. distinct: (G,) counts. groups: (K,) group of each class. sizes: (G,) classes of each group.
    """
    block = (square_root(matrix) - distinct.sqrt().diag()) / sizes.outer(sizes).sqrt()
    root = block[groups][:, groups]
    root.diagonal().add_(distinct.sqrt()[groups])
    return root


def square_root(matrix: torch.Tensor) -> torch.Tensor:
    """Return the square root (K, K) of a symmetric positive semidefinite matrix (K, K), which may be singular.

    LAPACK returns an eigenvalue of zero as a number of about K eps times the largest one, of either sign, whose root
    would be an error of sqrt(eps). Eigenvalues below K eps times the largest are therefore taken as zero.
    """
    values, vectors = torch.linalg.eigh(matrix)
    zero = len(values) * torch.finfo(values.dtype).eps * values[-1]
    return vectors * torch.where(values > zero, values, 0).sqrt() @ vectors.T
