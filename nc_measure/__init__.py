"""The command nc-measure: what measure_model.py does in a checkout, installed.

    pip install ".[measure]"
    nc-measure --model torchvision:resnet18 --weights FILE --data_dir DIR --layers layer3,layer4,head

The wheel holds the repository's scripts and rooms as files of the package `nc_measure.rooms`, so that no other name is
taken from yours. They are imported only when the command runs.
"""

import importlib
import importlib.util
import sys

__all__ = ["main"]


def main() -> None:
    """Run measure_model.py with the arguments of the command line, and exit.

    Example:
        >>> import sys
        >>> from nc_measure import main
        >>> sys.argv = ["nc-measure", "--help"]  # then main() prints the flags
    """
    rooms = importlib.util.find_spec("nc_measure.rooms")
    if rooms and rooms.submodule_search_locations:  # else they are found as they are in a checkout
        sys.path[:0] = list(rooms.submodule_search_locations)
    try:
        measure_model, utils = map(importlib.import_module, ("measure_model", "utils"))
    except ModuleNotFoundError as error:
        print(f'nc-measure: error: it needs {error.name}: pip install "neural-collapse[measure]"', file=sys.stderr)
        sys.exit(2)
    utils.run_script(measure_model.main)
