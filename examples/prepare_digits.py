"""Writes scikit-learn's 1,797 handwritten digits (8 x 8 grey pixels, classes 0 to 9) to the user cache as arrays.

    python examples/prepare_digits.py

`examples/recipes/digits.yaml` then reads them as `cache:digits.npz`: `image` (1797, 8, 8) bytes and `label` (1797,).
"""

import io

import numpy as np
from sklearn.datasets import load_digits

from rankfold.core.files import write_whole
from rankfold.train.places import cache_dir


def main() -> None:
    digits = load_digits()
    arrays = io.BytesIO()
    np.savez_compressed(arrays, image=(digits.images * 255 / 16).astype(np.uint8), label=digits.target)
    print(write_whole(cache_dir() / "digits.npz", arrays.getvalue()))


if __name__ == "__main__":
    main()
