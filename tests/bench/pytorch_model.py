"""TransformerDeltaNet in plain PyTorch, as one writes it with the parts that PyTorch has: what the service is compared with.

The mixer is the chunkwise form of the delta rule (Yang et al., arXiv:2406.06484): within a chunk of C tokens a triangular
system, between chunks one matrix of state a sequence.
"""

import torch
from torch import nn


class RMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x / (x.pow(2).mean(-1, keepdim=True).sqrt() + 1e-8) * self.scale


class DeltaNet(nn.Module):
    def __init__(self, d_model, chunk_size):
        super().__init__()
        self.chunk_size = chunk_size
        for name in "qkv":
            setattr(self, f"{name}_linear", nn.Linear(d_model, d_model))
            setattr(self, f"{name}_conv", nn.Conv1d(d_model, d_model, 3, padding=1))
        self.beta_linear = nn.Linear(d_model, 1)
        self.rms_norm = RMSNorm(d_model)
        self.output_linear = nn.Linear(d_model, d_model)

    def project(self, x, linear, conv):
        return torch.relu(conv(linear(x).transpose(1, 2)).transpose(1, 2))

    def forward(self, x):  # [B, T, d], T a multiple of the chunk
        batch, tokens, width = x.shape
        q = self.project(x, self.q_linear, self.q_conv)
        k = self.project(x, self.k_linear, self.k_conv)
        v = self.project(x, self.v_linear, self.v_conv)
        q = q / (q.norm(dim=-1, keepdim=True) + 1e-6)
        k = k / (k.norm(dim=-1, keepdim=True) + 1e-6)
        beta = torch.sigmoid(self.beta_linear(x))

        q, k, v, beta = (y.reshape(batch, -1, self.chunk_size, y.shape[-1]) for y in (q, k, v, beta))
        # (I + strict_lower(beta k k^T)) u = beta (v - k S), solved for both parts of the right side at once.
        lower = (beta * (k @ k.transpose(-1, -2))).tril(-1)
        solved = torch.linalg.solve_triangular(
            lower, beta * torch.cat((v, k), dim=-1), upper=False, unitriangular=True)
        values, keys = solved.split(width, dim=-1)
        attention = (q @ k.transpose(-1, -2)).tril()
        state = x.new_zeros(batch, width, width)
        outputs = []
        for chunk in range(tokens // self.chunk_size):
            u = values[:, chunk] - keys[:, chunk] @ state
            outputs.append(q[:, chunk] @ state + attention[:, chunk] @ u)
            state = state + k[:, chunk].transpose(-1, -2) @ u
        return self.output_linear(self.rms_norm(torch.cat(outputs, dim=1)))


class TransformerDeltaNet(nn.Module):
    def __init__(self, d_model, chunk_size, num_layers):
        super().__init__()
        self.layers = nn.ModuleList(DeltaNet(d_model, chunk_size) for _ in range(num_layers))
        self.final_rms_norm = RMSNorm(d_model)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return self.final_rms_norm(x)
