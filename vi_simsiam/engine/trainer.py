"""The former name of `engine.train`, for scripts that import it."""

from vi_simsiam.engine.train import Trainer

__all__ = ["Trainer"]
