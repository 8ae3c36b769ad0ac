"""What several tests share."""

import sys


def torchrun(ranks: int = 1) -> list[str]:
    """The command that starts a script in so many processes, at a port that nobody else can have taken."""
    if ranks == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks),
            "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
