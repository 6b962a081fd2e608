"""The models in NumPy and float64, token by token, written for reading; what the served numbers are compared with."""

import json
import math
import pathlib

import numpy as np

DTYPES = {"F32": np.float32, "F16": np.float16, "I64": np.int64}


def read_safetensors(path):
    """The tensors of a safetensors file by name, in their own dtypes; bfloat16 is widened to float32."""
    data = pathlib.Path(path).read_bytes()
    header_bytes = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + header_bytes])
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = (8 + header_bytes + offset for offset in entry["data_offsets"])
        if entry["dtype"] == "BF16":
            values = (np.frombuffer(data[begin:end], np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            values = np.frombuffer(data[begin:end], DTYPES[entry["dtype"]])
        tensors[name] = values.reshape(entry["shape"])
    return tensors


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def relu(x):
    return np.maximum(x, 0)


def silu(x):
    return x * sigmoid(x)


def l2_normalize(x):
    return x / (np.linalg.norm(x, axis=-1, keepdims=True) + 1e-6)


def rms_norm(x, scale):
    return x / (np.sqrt(np.mean(x * x, axis=-1, keepdims=True)) + 1e-8) * scale


def delta_rule(q, k, v, beta):
    """q, k: [T, K]  v: [T, V]  beta: [T]; returns [T, V]."""
    state = np.zeros((k.shape[1], v.shape[1]))
    out = np.empty_like(v)
    for t in range(len(v)):
        state += np.outer(k[t], beta[t] * (v[t] - state.T @ k[t]))
        out[t] = state.T @ q[t]
    return out


class Model:
    """A model directory, as the server reads it."""

    def __init__(self, directory):
        directory = pathlib.Path(directory)
        self.config = json.loads((directory / "config.json").read_text())
        tensors = read_safetensors(directory / "model.safetensors")
        self.weights = {name: values.astype(np.float64) for name, values in tensors.items()}
        self.centered = self.config.get("conv_padding", "centered") == "centered"

    def __call__(self, sequence):
        """One sequence: [T, width] or ids [T]; returns [T, width of output]."""
        return getattr(self, self.config["model_type"])(sequence)

    def transformer_deltanet(self, x):
        for layer in range(self.config["num_layers"]):
            x = x + self.mixer(x, f"layers.{layer}.", relu)
        return self.norm(x, "final_rms_norm")

    def transformer_block(self, x):
        x = self.norm(x + self.mixer(x, "deltanet.", relu), "norm1")
        values, gates = np.split(self.linear(x, "ffn.0"), 2, axis=-1)
        return self.norm(x + self.linear(values * sigmoid(gates), "ffn.2"), "norm2")

    def deltanet_model(self, ids):
        x = self.weights["embedding.weight"][ids]
        for layer in range(self.config["depth"]):
            prefix = f"layers.{layer}."
            x = x + self.mixer(self.norm(x, prefix + "norm1"), prefix + "delta_net.", silu)
            y = self.norm(x, prefix + "norm2")
            gated = silu(self.linear(y, prefix + "mlp.w1")) * self.linear(y, prefix + "mlp.w2")
            x = x + self.linear(gated, prefix + "mlp.w3")
        return self.linear(self.norm(x, "norm_f"), "head")

    def mixer(self, x, prefix, activation):
        q, k, v = (
            activation(self.conv(self.linear(x, f"{prefix}{name}_linear"), f"{prefix}{name}_conv")) for name in "qkv"
        )
        beta = sigmoid(self.linear(x, prefix + "beta_linear"))  # [T, H]
        heads = [
            delta_rule(l2_normalize(q), l2_normalize(k), v, beta[:, head])
            for head, (q, k, v) in enumerate(zip(*(np.split(y, beta.shape[1], axis=-1) for y in (q, k, v))))
        ]
        return self.linear(self.norm(np.concatenate(heads, axis=-1), prefix + "rms_norm"), prefix + "output_linear")

    def linear(self, x, name):
        return x @ self.weights[name + ".weight"].T + self.weights.get(name + ".bias", 0)

    def norm(self, x, name):
        return rms_norm(x, self.weights[name + ".scale"])

    def conv(self, x, name):
        weight = self.weights[name + ".weight"]  # [out, in, 3]
        padded = np.pad(x, ((1, 1) if self.centered else (2, 0), (0, 0)))
        return sum(padded[j : j + len(x)] @ weight[:, :, j].T for j in range(3)) + self.weights[name + ".bias"]


def relative_error(found, wanted):
    """The largest difference, relative to the largest magnitude of what is wanted. NaN counts as infinitely wrong."""
    error = np.max(np.abs(found.astype(np.float64) - wanted)) / np.max(np.abs(wanted))
    return math.inf if np.isnan(error) else float(error)
