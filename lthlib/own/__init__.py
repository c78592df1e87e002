"""Networks of your own: does a pruned network keep what its dense parent has?

    python -m lthlib check DENSE PRUNED [PRUNED ...] --data IMAGES --network NAME --report report.html

Nothing is trained. `compare` does the same for networks in memory.
"""

from lthlib.own.command import check, compare_files
from lthlib.own.compare import Comparison, compare, sparsity

__all__ = ["Comparison", "check", "compare", "compare_files", "sparsity"]
