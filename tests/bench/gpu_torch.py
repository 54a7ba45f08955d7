"""The other side of the step of `tests.bench.gpu`: the same weights and batch in torch and
transformers, under autocast to bfloat16, every layer checkpointed.

What is compiled is each layer, the connector and the loss (torch's "regional compilation"), since
the whole model would take longer to compile than there is. Segments are a block mask of
flex_attention, whose blocks of unseen pairs are skipped; on CPU, where that has no backward pass, a
mask of all pairs.
"""

import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from tests.bench import training_torch
from tests.bench.gpu import LOSSES, STEPS, report, speed

TOLERANCE = 5e-3
"""Relative, of losses: both compute in bfloat16, which has 8 bits, and round at other places; a
loss is the mean over thousands of tokens."""
ATTENTION = "packed"


def main(part: str, folder: str, *flags: str) -> None:
    """Takes the steps of the part, and holds their losses against ours.

    Raises:
      SystemExit: the losses differ, with those of both sides.
    """
    device = "cpu" if "--small" in flags else "cuda"
    known = json.loads((Path(folder) / "ours.json").read_text())
    report(torch=torch.__version__, transformers=transformers.__version__)
    began = time.perf_counter()
    step = start(Path(folder), device)
    losses, seconds = [step()], []
    report(first_step_and_compile_seconds=time.perf_counter() - began)
    for _ in range(STEPS):
        began = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - began)
    report(**speed(seconds, known))
    if device == "cuda":
        report(device_peak_gib=torch.cuda.max_memory_allocated() / 2**30)
    pairs = list(zip(losses, known["losses"], strict=False))[:LOSSES]
    largest = max(abs(theirs - ours) / abs(ours) for theirs, ours in pairs)
    report(losses=losses[:LOSSES], losses_differ_by=largest)
    if not largest <= TOLERANCE:
        raise SystemExit(f"losses differ by {largest:.1e}, more than {TOLERANCE:.0e}: {pairs}")


def start(folder: Path, device: str, dtype: torch.dtype = torch.bfloat16) -> Callable[[], float]:
    """Returns what takes a step, its matmuls in `dtype`, and returns its loss."""
    transformers.utils.logging.disable_progress_bar()
    transformers.AttentionInterface.register(ATTENTION, attend)
    # Layers differ by what torch guards against, and are far more than its limit; above it, it
    # would go on without compiling.
    torch._dynamo.config.recompile_limit = 64
    torch.backends.cuda.matmul.allow_tf32 = True
    model = training_torch.Model(folder, ATTENTION).train().to(device)
    for tower in (model.vision, model.llm):
        tower.gradient_checkpointing_enable({"use_reentrant": False})
    # On CPU there need be no C++ compiler: the graphs are taken, and run as they are.
    options = {"backend": "inductor" if device == "cuda" else "eager", "dynamic": False}
    encoder = getattr(model.vision, "vision_model", model.vision).encoder
    for layer in (*encoder.layers, *model.llm.model.layers):
        layer.compile(**options)
    connect, loss_of = (
        functools.partial(checkpoint, torch.compile(each, **options), use_reentrant=False)
        for each in (model.connector, functools.partial(token_loss, model.llm.lm_head))
    )
    optimizer = training_torch.make_optimizer(model)
    batch = {
        name: torch.tensor(array, device=device)
        for name, array in np.load(folder / "batch.npz").items()
    }
    # As SigLIP's processor normalises them: [B, I, Y, X, C] -> [B I, C, Y, X].
    pixels = batch["tiles"].flatten(0, 1).permute(0, 3, 1, 2).float() / 127.5 - 1
    # Ids beyond the table hold the places of visual tokens.
    is_image = batch["tokens"] >= model.llm.config.vocab_size
    tokens = batch["tokens"].masked_fill(is_image, 0).long()
    predicted = (batch["loss_weights"] > 0).flatten().nonzero()[:, 0]
    targets = batch["targets"].flatten()[predicted].long()
    mask = mask_of(batch["segment_ids"], blocks=device == "cuda")

    def loss() -> torch.Tensor:
        features = model.vision(pixels).last_hidden_state
        embedding = model.llm.get_input_embeddings()
        visual = connect(features.flatten(0, 1), embedding.weight)
        inputs = embedding(tokens)
        inputs = inputs.masked_scatter(is_image[..., None], visual.to(inputs.dtype))
        hidden = model.llm.model(
            inputs_embeds=inputs,
            attention_mask=mask,
            position_ids=batch["positions"].long(),
            use_cache=False,
        ).last_hidden_state
        return loss_of(hidden.flatten(0, 1)[predicted], targets)

    def step() -> float:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training_torch.CLIP_NORM)
        optimizer.step()
        found = value.item()
        if device == "cuda":
            torch.cuda.synchronize()
        return found

    return step


def token_loss(head: torch.nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Returns the mean loss of predicted tokens, softmax in float32."""
    return F.cross_entropy(head(hidden).float(), targets)


def mask_of(segment_ids: torch.Tensor, blocks: bool) -> torch.Tensor | BlockMask:
    """Returns the causal mask of packed sequences: of blocks, or of all pairs."""

    def seen(row, head, query, key):
        return (query >= key) & (segment_ids[row, query] == segment_ids[row, key])

    rows, length = segment_ids.shape
    device = segment_ids.device.type
    if blocks:
        # Compiled, the pairs of a row are never made all at once.
        is_gpu = device == "cuda"
        return create_block_mask(seen, rows, None, length, length, device=device, _compile=is_gpu)
    index = torch.arange(length, device=device)
    pairs = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]
    return pairs & (index[:, None] >= index)


def attend(module, query, key, value, attention_mask, scaling=None, **_):
    """Returns what transformers takes of attention: [B, T, H, h], and no weights."""
    # Positions are rotated in float32 under autocast.
    query, key = query.to(value.dtype), key.to(value.dtype)
    options = {"scale": scaling, "enable_gqa": True}
    if isinstance(attention_mask, BlockMask):
        mixed = flex_attention(query, key, value, block_mask=attention_mask, **options)
    else:
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, **options
        )
    return mixed.transpose(1, 2).contiguous(), None


if __name__ == "__main__":
    main(*sys.argv[1:])
