"""History routing (arXiv 2512.15702): a query attends to its own chunk and to the few that suit it best.

For each query token and head, a past chunk's score is the product of the query with the mean of the chunk's
keys, after RoPE. The `route` chunks of highest score and the query's own chunk are attended to exactly, in
one softmax over all their tokens; a query with no more past than that sees all of it. Which chunks are chosen
has no gradient; attention to them has.

A layout is that of model.py: ((first, last, past), ...) in tokens, where the chunks that end at or before
`past` lead the layout and are the past. Queries are its last chunks.
"""

import functools

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask


def most_past(layout) -> int:
    """The largest number of chunks that a query may choose from."""
    return max(past_chunks(layout, past) for *_, past in layout)


def past_chunks(layout, past: int) -> int:
    return sum(last <= past for _, last, _ in layout)


@torch.no_grad()
def pool(k, layout):
    """The mean key of every chunk, in fp32: k [B, L, N, D] -> [B, N, C, D]."""
    return torch.stack([k[:, first:last].float().mean(1) for first, last, _ in layout], 2)


def attention(q, k, v, layout, route: int, pooled=None, flex=None):
    """Attention of q [B, Lq, N, D] to k and v [B, Lk, N, D] -> [B, Lq, N * D].

    pooled    the mean keys of all chunks that are past to any, if they are known
    flex      flex_attention, compiled, to be used on a GPU. It skips the blocks of keys that no query of a
              block of queries chose, has gradients, and works on shapes that do not depend on what is chosen;
              to sort queries by chunk, as `grouped` does, the CPU would wait for the GPU in every layer
    """
    pooled = pool(k, layout[:most_past(layout)]) if pooled is None else pooled
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))                                       # [B, N, L, D]
    begin = layout[-1][1] - q.shape[2]
    chunks = [chunk for chunk in layout if chunk[0] >= begin]
    queries = q.split([last - first for first, last, _ in chunks], dim=2)
    choices = [choose(part, pooled[:, :, :past_chunks(layout, past)], route)
               for part, (*_, past) in zip(queries, chunks, strict=True)]
    if flex:
        y = flex(q, k, v, block_mask=block_mask(choices, layout, chunks, k.shape[2]))
    else:
        y = torch.cat([one_chunk(part, k, v, chosen, layout, chunk)
                       for part, chosen, chunk in zip(queries, choices, chunks, strict=True)], 2)
    return y.transpose(1, 2).flatten(2)


@torch.no_grad()
def choose(q, pooled, route: int):
    """The places of the chosen chunks, in no particular order: q [B, N, L, D] -> [B, N, L, at most route]."""
    scores = q.float() @ pooled.transpose(2, 3)                                            # [B, N, L, C]
    return scores.topk(min(route, scores.shape[3])).indices


def one_chunk(q, k, v, chosen, layout, chunk):
    """Attention of a chunk's queries, in the form that is the fastest."""
    first, last, past = chunk
    count = past_chunks(layout, past)
    if chosen.shape[3] == count:
        return F.scaled_dot_product_attention(q, visible(k, *chunk), visible(v, *chunk))
    if worth_grouping(q, count, chosen.shape[3]):
        return grouped(q, k, v, chosen, layout[:count], (first, last))
    seen = is_chosen(chosen, count)
    sizes = torch.tensor([b - a for a, b, _ in layout[:count]], device=q.device)
    mask = F.pad(seen.repeat_interleave(sizes, 3), (0, last - first), value=True)
    return F.scaled_dot_product_attention(q, visible(k, *chunk), visible(v, *chunk), attn_mask=mask)


def worth_grouping(q, past: int, route: int) -> bool:
    """By measurement on a CPU: with a mask, length^2 * past pairs of tokens are computed; with groups,
    length^2 * route, and each of the past chunks takes as long as 6,000 pairs more."""
    return not torch.is_grad_enabled() and q.shape[2]**2 * (past - route) > 6000 * past


def visible(x, first, last, past):  # [B, N, L, D]; a view where the past ends at the chunk
    return x[:, :, :last] if past == first else torch.cat([x[:, :, :past], x[:, :, first:last]], dim=2)


def is_chosen(chosen, count: int):
    """As truth values: [B, N, L, route] -> [B, N, L, count]."""
    none = torch.zeros(*chosen.shape[:3], count, dtype=torch.bool, device=chosen.device)
    return none.scatter_(3, chosen, True)


# ----------------------------------------------------------------------------------------------------
# two branches: a chunk with itself, and every query with the chunks that it chose, merged by log-sum-exp

def grouped(q, k, v, chosen, past, own):
    """Queries are grouped by the chunk that they chose: there are as many products as choices, however many
    chunks, and each that was chosen is read once. q [B, N, L, D]; past: the chunks to choose from; own: the
    first and last token of the queries' own."""
    batch, heads, length, route = chosen.shape
    rows = torch.arange(batch * heads, device=q.device).view(batch, heads, 1, 1)
    # a group is all choices of a chunk by a clip's head
    group, order = (rows * len(past) + chosen).flatten().sort()                            # [B N L route]
    counts = torch.bincount(group, minlength=batch * heads * len(past)).tolist()
    sorted_q = q.flatten(0, 2)[order // route].split(counts)
    keys, values = ([head for clip in x.unbind() for head in clip.unbind()] for x in (k, v))
    parts = []
    for i, part in enumerate(sorted_q):
        if len(part):
            row, chunk = divmod(i, len(past))
            first, last, _ = past[chunk]
            parts.append(partial_attention(part, keys[row][first:last], values[row][first:last]))
    y, weight = (unsorted(torch.cat(x), order).view(batch, heads, length, route, -1)
                 for x in zip(*parts, strict=True))
    y_own, weight_own = partial_attention(q, k[:, :, slice(*own)], v[:, :, slice(*own)])
    y = torch.cat([y, y_own.unsqueeze(3)], 3)
    weight = torch.cat([weight, weight_own[..., None, None]], 3)
    return (weight.softmax(3) * y).sum(3).to(v.dtype)


def unsorted(x, order):
    back = torch.empty_like(x)
    back[order] = x
    return back


def partial_attention(q, k, v):
    """Attention to a part of the keys, and the logarithm of the sum of its weights, in fp32."""
    scores = (q * q.shape[-1]**-0.5 @ k.transpose(-1, -2)).float()
    share = scores.softmax(-1)
    weight = scores.amax(-1) - share.amax(-1).log()  # the largest share is exp(largest score - weight)
    return (share.to(v.dtype) @ v).float(), weight


# ----------------------------------------------------------------------------------------------------
# for flex_attention

@torch.no_grad()
def block_mask(choices, layout, chunks, keys: int, block: int = 128) -> BlockMask:
    """What was chosen as flex_attention takes it. Keys beyond the layout's end, of a cache that is not full,
    are nobody's."""
    own = len(layout) - len(chunks)
    chunk_of, held = keys_of_chunks(layout, keys, block, choices[0].device)
    seen = []
    for i, chosen in enumerate(choices, own):
        seen.append(is_chosen(chosen, len(held)))                                          # [B, N, l, C]
        seen[-1][..., i] = True
    seen = torch.cat(seen, 2)
    length = seen.shape[2]
    rest = seen[:, :, -1:].expand(-1, -1, -length % block, -1)
    blocks = torch.cat([seen, rest], 2).unflatten(2, (-1, block))               # [B, N, blocks, block, C]
    touched = blocks.any(3).float() @ held > 0                                  # [B, N, blocks, key blocks]
    full = (~blocks.all(3)).float() @ held == 0

    def listed(blocks):  # how many and which, in ascending order
        return blocks.sum(-1, dtype=torch.int32), (~blocks).int().argsort(dim=-1, stable=True).int()

    def allowed(b, h, q, kv):
        return seen[b, h, q, chunk_of[kv]]

    return BlockMask.from_kv_blocks(*listed(touched & ~full), *listed(full), BLOCK_SIZE=block,
                                    mask_mod=allowed, seq_lengths=(length, keys))


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)
def keys_of_chunks(layout, keys: int, block: int, device):
    """The chunk of every key, [keys], and whether a chunk has keys in a block, [C, key blocks]. C is rounded
    up, so that not every chunk that is cached compiles a kernel of its own; the last column is nobody's."""
    columns = -(-(len(layout) + 1) // 32) * 32
    sizes = torch.tensor([last - first for first, last, _ in layout])
    chunk_of = torch.arange(len(layout)).repeat_interleave(sizes, output_size=layout[-1][1])
    chunk_of = F.pad(chunk_of, (0, keys + -keys % block - len(chunk_of)), value=columns - 1)
    held = F.one_hot(chunk_of.view(-1, block), columns).amax(1).float().T
    return chunk_of[:keys].to(device), held.to(device)
