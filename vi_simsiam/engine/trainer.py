"""`Trainer` under its documented name."""

from vi_simsiam.engine.train import Trainer

__all__ = ["Trainer"]
