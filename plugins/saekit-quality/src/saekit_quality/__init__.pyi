from .model import ContrastiveQualityModel as ContrastiveQualityModel
from .trainer import ContrastiveTrainer as ContrastiveTrainer
