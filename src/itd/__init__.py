"""itd: erase concepts from text-to-image diffusion models and leave everything else as it is."""

from itd import emoji
from itd.activations import ActivationStore, record
from itd.artifacts import itd_version
from itd.eraser import Edit, Eraser
from itd.erasing import PRESETS, EraseConfig, add_concepts, erase
from itd.evaluation import evaluate
from itd.features import ConceptFeatures, FeatureStats
from itd.gate import Gate
from itd.hooks import HookPoint
from itd.kernels import SparseCodes
from itd.prompts import Prompt, PromptSet
from itd.retained import Retained
from itd.sae import SAE, SAEConfig
from itd.training import TrainConfig, train

__version__ = itd_version()

__all__ = [
    "PRESETS", "SAE", "ActivationStore", "ConceptFeatures", "Edit", "EraseConfig", "Eraser", "FeatureStats", "Gate",
    "HookPoint", "Prompt", "PromptSet", "Retained", "SAEConfig", "SparseCodes", "TrainConfig", "add_concepts", "emoji",
    "erase", "evaluate", "record", "train",
]  # fmt: skip
