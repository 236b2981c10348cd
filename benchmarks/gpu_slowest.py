"""The kernels that took longest in a CSV of ncu, as an alternative of a regular expression.

python -m benchmarks.gpu_slowest FILE COUNT
"""

import csv
import re
import sys
from collections import defaultdict
from pathlib import Path


def slowest(text: str, count: int) -> list[str]:
    """Names, without arguments, of the kernels with the longest single launch."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise ValueError("gpu_slowest: the file holds no table of ncu")
    longest: dict[str, float] = defaultdict(float)
    for row in csv.DictReader(lines[start:]):
        name = re.sub(r"^void |\(anonymous namespace\)::|[<(].*", "", row["Kernel Name"])
        name = name.split("::")[-1]
        longest[name] = max(longest[name], float(row["Metric Value"].replace(",", "")))
    return sorted(longest, key=longest.__getitem__, reverse=True)[:count]


if __name__ == "__main__":
    print("|".join(slowest(Path(sys.argv[1]).read_text(), int(sys.argv[2]))))
