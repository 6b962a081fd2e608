"""`delta_net` in plain PyTorch, as one writes it with the parts that PyTorch has: what the engine is compared with on a CPU.

Prompts go through the chunkwise form of the delta rule (Yang et al., arXiv:2406.06484), single tokens through the
recurrence; a cache is, for each layer, the last inputs of the convolution and the state.
"""

import torch
from torch.nn import functional as F

CHUNK = 64


def rms_norm(x, scale, epsilon):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * scale


def delta_rule(q, k, v, beta, state):
    """q, k [B,H,T,K], v [B,H,T,V], beta [B,H,T,1], state [B,H,K,V]: outputs [B,H,T,V] and the new state."""
    if q.shape[2] == 1:
        u = beta * (v - k @ state)
        state = state + k.transpose(-1, -2) @ u
        return q @ state, state
    outputs = []
    for begin in range(0, q.shape[2], CHUNK):
        cq, ck, cv, cb = (x[:, :, begin:begin + CHUNK] for x in (q, k, v, beta))
        lower = (cb * (ck @ ck.transpose(-1, -2))).tril(-1)
        u = torch.linalg.solve_triangular(lower, cb * (cv - ck @ state), upper=False, unitriangular=True)
        outputs.append(cq @ state + (cq @ ck.transpose(-1, -2)).tril() @ u)
        state = state + ck.transpose(-1, -2) @ u
    return torch.cat(outputs, 2), state


class DeltaNetLM:
    """Of `weights`, a checkpoint's tensors by name, and `config`, its config.json."""

    def __init__(self, weights, config):
        self.w = weights
        self.layers, self.heads = config["num_hidden_layers"], config["num_heads"]
        self.epsilon = config.get("norm_eps", 1e-6)

    def heads_of(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def mixer(self, x, prefix, cache):
        inputs = {n: x @ self.w[f"{prefix}{n}_proj.weight"].T for n in "qkv"}
        kept, state = cache if cache is not None else (None, None)
        new_kept, streams = {}, {}
        for n, y in inputs.items():
            kernel = self.w[f"{prefix}{n}_conv1d.weight"]  # [C, 1, taps]
            taps = kernel.shape[-1]
            before = kept[n] if kept is not None else y.new_zeros(y.shape[0], taps - 1, y.shape[2])
            y = torch.cat((before, y), 1)
            new_kept[n] = y[:, 1 - taps:]
            streams[n] = self.heads_of(F.silu(F.conv1d(y.transpose(1, 2), kernel, groups=y.shape[2])).transpose(1, 2))
        q, k, v = (streams[n] for n in "qkv")
        q, k = (y * torch.rsqrt(y.pow(2).sum(-1, keepdim=True) + 1e-6) for y in (q, k))
        q = q * q.shape[-1] ** -0.5
        beta = torch.sigmoid(x @ self.w[f"{prefix}b_proj.weight"].T).transpose(1, 2).unsqueeze(-1)
        if state is None:
            state = x.new_zeros(x.shape[0], self.heads, k.shape[-1], v.shape[-1])
        o, state = delta_rule(q, k, v, beta, state)
        o = rms_norm(o, self.w[f"{prefix}o_norm.weight"], self.epsilon).transpose(1, 2).flatten(-2)
        return o @ self.w[f"{prefix}o_proj.weight"].T, (new_kept, state)

    def __call__(self, ids, cache=None):
        """ids [B,T]: logits of the last token [B,V], and the cache to go on with."""
        x = self.w["model.embeddings.weight"][ids]
        new_cache = []
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}."
            y = rms_norm(x, self.w[prefix + "attn_norm.weight"], self.epsilon)
            mixed, kept = self.mixer(y, prefix + "attn.", cache[layer] if cache is not None else None)
            new_cache.append(kept)
            x = x + mixed
            y = rms_norm(x, self.w[prefix + "mlp_norm.weight"], self.epsilon)
            gate, up = (y @ self.w[f"{prefix}mlp.{n}_proj.weight"].T for n in ("gate", "up"))
            x = x + (F.silu(gate) * up) @ self.w[prefix + "mlp.down_proj.weight"].T
        last = rms_norm(x[:, -1], self.w["model.norm.weight"], self.epsilon)
        return last @ self.w["lm_head.weight"].T, new_cache
