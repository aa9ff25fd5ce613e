"""The kernel that chooses one token for each row of logits.

Purpose: the most likely token, or a draw with min_p, top_k and top_p, without sorting a row.
Does not know: penalties, seeds, where logits come from.
Invariant: a row's token depends on that row alone; weights are added as integers, so in any order; ties stay
or go together.

A filter keeps weights from a bound on, and the bound is the largest one for which enough is kept: top_k's
count, or top_p's share of the sum. Weights are floats from 0 to 1, whose bits are ordered as they are, so it
is found by dividing a range of bits by eight until one weight is left in it: mostly four to six passes over
a row, which lies in the cache by then.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _weights(row, start, V: tl.constexpr, top, coldness, BLOCK: tl.constexpr):
    """exp((logit - top) * coldness) of the tokens from `start` on, 0 behind the last."""
    offsets = start + tl.arange(0, BLOCK)
    logits = tl.load(row + offsets, mask=offsets < V, other=float("-inf")).to(tl.float32)
    return tl.exp((logits - top) * coldness)


@triton.jit
def _units(weights):
    """Rounded down to multiples of 2**-40."""
    return (weights * 1099511627776.0).to(tl.int64)


@triton.jit
def _narrow(low, at_low, high, at_high, bound, figure, goal):
    """The range of bounds after the figure of one within has become known; called with ascending ones."""
    enough = figure >= goal
    tighter = (figure < goal) & (bound < high)
    return (
        tl.where(enough, bound, low),
        tl.where(enough, figure, at_low),
        tl.where(tighter, bound, high),
        tl.where(tighter, figure, at_high),
    )


@triton.jit
def _bound(
    row, V: tl.constexpr, top, coldness, low, at_low, goal, by_count: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The bits of a bound that keeps the same weights as the largest one whose figure is at least `goal`.

    The figure of a bound is the number of weights that reach it, or their sum. low: bits of a bound that
    keeps enough; at_low: its figure. Ends when the range holds one weight, or its lower end keeps just
    enough.
    """
    high = tl.full([], 0x3F800001, tl.int32)  # above a weight of 1
    FIGURE: tl.constexpr = tl.int32 if by_count else tl.int64
    at_high = tl.full([], 0, FIGURE)
    least = tl.full([], 1, FIGURE)
    if not by_count:
        least = _units(low.to(tl.float32, bitcast=True))
    while (high - low > 1) & (at_low - at_high >= 2 * least) & (at_low != goal):
        part = tl.maximum((high - low) // 8, 1)
        sum1 = tl.zeros([BLOCK], FIGURE)
        sum2 = tl.zeros([BLOCK], FIGURE)
        sum3 = tl.zeros([BLOCK], FIGURE)
        sum4 = tl.zeros([BLOCK], FIGURE)
        sum5 = tl.zeros([BLOCK], FIGURE)
        sum6 = tl.zeros([BLOCK], FIGURE)
        sum7 = tl.zeros([BLOCK], FIGURE)
        for start in tl.range(0, V, BLOCK, num_stages=3):
            weights = _weights(row, start, V, top, coldness, BLOCK)
            bits = weights.to(tl.int32, bitcast=True)
            amounts = tl.full([BLOCK], 1, FIGURE)
            if not by_count:
                amounts = _units(weights)
            sum1 += tl.where(bits >= low + part, amounts, 0)
            sum2 += tl.where(bits >= low + 2 * part, amounts, 0)
            sum3 += tl.where(bits >= low + 3 * part, amounts, 0)
            sum4 += tl.where(bits >= low + 4 * part, amounts, 0)
            sum5 += tl.where(bits >= low + 5 * part, amounts, 0)
            sum6 += tl.where(bits >= low + 6 * part, amounts, 0)
            sum7 += tl.where(bits >= low + 7 * part, amounts, 0)
        base = low
        low, at_low, high, at_high = _narrow(low, at_low, high, at_high, base + part, tl.sum(sum1), goal)
        low, at_low, high, at_high = _narrow(low, at_low, high, at_high, base + 2 * part, tl.sum(sum2), goal)
        low, at_low, high, at_high = _narrow(low, at_low, high, at_high, base + 3 * part, tl.sum(sum3), goal)
        low, at_low, high, at_high = _narrow(low, at_low, high, at_high, base + 4 * part, tl.sum(sum4), goal)
        low, at_low, high, at_high = _narrow(low, at_low, high, at_high, base + 5 * part, tl.sum(sum5), goal)
        low, at_low, high, at_high = _narrow(low, at_low, high, at_high, base + 6 * part, tl.sum(sum6), goal)
        low, at_low, high, at_high = _narrow(low, at_low, high, at_high, base + 7 * part, tl.sum(sum7), goal)
        if not by_count:
            least = _units(low.to(tl.float32, bitcast=True))
    return low


@triton.jit
def _figure(row, V: tl.constexpr, top, coldness, low, by_count: tl.constexpr, BLOCK: tl.constexpr):
    """How many weights have bits of at least `low`, or their sum."""
    FIGURE: tl.constexpr = tl.int32 if by_count else tl.int64
    figures = tl.zeros([BLOCK], FIGURE)
    for start in tl.range(0, V, BLOCK, num_stages=3):
        weights = _weights(row, start, V, top, coldness, BLOCK)
        amounts = tl.full([BLOCK], 1, FIGURE)
        if not by_count:
            amounts = _units(weights)
        figures += tl.where(weights.to(tl.int32, bitcast=True) >= low, amounts, 0)
    return tl.sum(figures)


@triton.jit
def _draw(
    row, V: tl.constexpr, top, coldness, low, uniform, BLOCK: tl.constexpr, TILES: tl.constexpr
):  # fmt: skip
    """The first token whose cumulative weight, of those whose bits are at least `low`, exceeds its share."""
    numbers = tl.arange(0, TILES)
    sums = tl.zeros([TILES], tl.int64)
    for tile in tl.range(0, (V + BLOCK - 1) // BLOCK, num_stages=3):
        weights = _weights(row, tile * BLOCK, V, top, coldness, BLOCK)
        units = tl.where(weights.to(tl.int32, bitcast=True) >= low, _units(weights), 0)
        sums = tl.where(numbers == tile, tl.sum(units), sums)
    target = (uniform * tl.sum(sums).to(tl.float64)).to(tl.int64)
    tile = tl.sum((tl.cumsum(sums) <= target).to(tl.int32))
    before = tl.sum(tl.where(numbers < tile, sums, 0))
    weights = _weights(row, tile * BLOCK, V, top, coldness, BLOCK)
    units = tl.where(weights.to(tl.int32, bitcast=True) >= low, _units(weights), 0)
    return tile * BLOCK + tl.sum((before + tl.cumsum(units) <= target).to(tl.int32))


@triton.jit(do_not_specialize_on_alignment=["slots", "tokens", "usable"])
def choose_kernel(
    logits, temperatures, min_ps, top_ks, top_ps, uniforms, slots, kept, tokens, usable, stride, no_slot,
    V: tl.constexpr, draws: tl.constexpr, keeps: tl.constexpr, BLOCK: tl.constexpr,
    CUT: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Program r: row r. slots, kept, no_slot: read if `keeps`; the parameters: if `draws`."""
    number = tl.program_id(0)
    row = logits + number.to(tl.int64) * stride
    slot = no_slot - 1
    if keeps:
        slot = tl.load(slots + number)
    token = tl.full([], 0, tl.int32)
    ok = tl.full([], 1, tl.int32)
    if slot != no_slot:
        best = tl.full([BLOCK], float("-inf"), tl.float32)
        places = tl.zeros([BLOCK], tl.int32)
        broken = tl.zeros([BLOCK], tl.int32)
        for start in tl.range(0, V, BLOCK, num_stages=3):
            offsets = start + tl.arange(0, BLOCK)
            values = tl.load(row + offsets, mask=offsets < V, other=float("-inf")).to(tl.float32)
            places = tl.where(values > best, offsets, places)
            best = tl.where(values > best, values, best)
            broken |= (values != values).to(tl.int32)
        top = tl.max(best)
        token = tl.min(tl.where(best == top, places, V))
        ok = ((tl.max(broken) == 0) & (tl.abs(top) < float("inf"))).to(tl.int32)
        if draws:
            temperature = tl.load(temperatures + number)
            if (temperature > 0) & (ok != 0):
                coldness = tl.div_rn(tl.full([], 1.0, tl.float32), temperature)
                low = tl.load(min_ps + number).to(tl.int32, bitcast=True)
                low = tl.maximum(low, 0x2B800000)  # 2**-40: what is below is never drawn
                count = tl.load(top_ks + number)
                share = tl.load(top_ps + number)
                if (count > 0) & (count < V):
                    left = _figure(row, V, top, coldness, low, True, BLOCK)
                    if left > count:
                        low = _bound(row, V, top, coldness, low, left, count, True, CUT)
                if share > 0:
                    total = _figure(row, V, top, coldness, low, False, BLOCK)
                    goal = tl.ceil(share * total.to(tl.float64)).to(tl.int64)
                    low = _bound(row, V, top, coldness, low, total, goal, False, CUT)
                token = _draw(row, V, top, coldness, low, tl.load(uniforms + number), BLOCK, TILES)
                token = tl.minimum(token, V - 1)  # if a product of float64 was rounded up to the total
        token = tl.where(ok != 0, token, 0)
    tl.store(tokens + number, token.to(tl.int64))
    tl.store(usable + number, ok.to(tl.uint8))
    if keeps:
        tl.store(kept + slot, token.to(tl.int64))
