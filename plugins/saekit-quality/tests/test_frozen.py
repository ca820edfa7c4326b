"""Frozen features are the encoder's own states of the response, whatever the batch and its padding."""

import numpy as np
import torch
from saekit_quality.frozen import frozen_features
from saekit_quality.generator import generate
from transformers import AutoModel, AutoTokenizer

from saekit import organism


def test_features_equal_those_of_each_response_alone():
    data = generate(3, responses=1, seed=0)
    model, tokenizer = AutoModel.from_pretrained(organism.directory()).eval(), AutoTokenizer.from_pretrained(organism.directory())
    for pooling in ("mean", "last"):
        found = frozen_features(data, model, tokenizer, pooling=pooling, batch=2)
        for i in range(3):
            ids = tokenizer(f"{data.contexts[i]}\n{data.responses[i]}", return_tensors="pt")["input_ids"]
            n = len(tokenizer(data.responses[i], add_special_tokens=False)["input_ids"])
            with torch.no_grad():
                states = model(ids).last_hidden_state[0, -n:]
            wanted = states.mean(0) if pooling == "mean" else states[-1]
            np.testing.assert_allclose(found[i], wanted.numpy(), atol=2e-4)
