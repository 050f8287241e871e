"""Run ``samix study`` from a checkout.

python benchmarks/study.py benchmarks/studies/equal_epochs.yaml data.root=cifar10
"""

from __future__ import annotations

import sys

from ssl_samix.cli.main import main

if __name__ == "__main__":
    main(["study", *sys.argv[1:]])
