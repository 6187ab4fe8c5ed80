"""Products of tiles, for every kernel that multiplies matrices. Private to `ops`.

    accumulate       acc + a b, operands rounded to OPERAND: BF16 on the tensor cores, or FP32 without the TF32 detour
    accumulate_fp32  acc + a b with FP32 operands kept whole, on the same tensor cores
    tile_product     the loop over k, cut into fixed segments
    grouped_tile     which tile a program computes, in an order that the L2 cache likes

An FP32 number is exactly the sum of three BF16 numbers (3 x 8 bits; the ends of the exponent range aside), so a product
with a BF16-valued matrix is three BF16 products, and one of two FP32 matrices is nine, of which the three smallest are
below the rounding of FP32 accumulation and left out. The smallest terms are added first. (Henry, Tang, Heinecke,
1904.06376.)
"""

from ops.jit import jit, tl


@jit()
def accumulate(a, b, acc, OPERAND: tl.constexpr):
    """acc FP32 [M, N] + a [M, K] b [K, N], both rounded to OPERAND (tl.bfloat16 or tl.float32)."""
    return tl.dot(a.to(OPERAND), b.to(OPERAND), acc, input_precision="ieee")


@jit()
def split_terms(x):
    """FP32 x -> three BF16 terms, largest first, whose exact sum is x."""
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@jit()
def accumulate_fp32(a, b, acc, OPERAND: tl.constexpr):
    """acc FP32 [M, N] + a [M, K] b [K, N] as if in FP32.

    OPERAND tl.float32: one FP32 product. tl.bfloat16: each of a and b is BF16 and taken as it is, or FP32 and split.
    The FP32 one is best given as b: terms of a stay in registers, those of b go where the tensor cores read.
    """
    if OPERAND.is_fp32():
        acc = accumulate(a, b, acc, OPERAND)
    elif a.dtype == tl.float32 and b.dtype == tl.float32:
        a0, a1, a2 = split_terms(a)
        b0, b1, b2 = split_terms(b)
        acc = tl.dot(a0, b2, tl.dot(a1, b1, tl.dot(a2, b0, acc)))
        acc = tl.dot(a0, b0, tl.dot(a0, b1, tl.dot(a1, b0, acc)))
    elif a.dtype == tl.float32:
        a0, a1, a2 = split_terms(a)
        acc = tl.dot(a0, b, tl.dot(a1, b, tl.dot(a2, b, acc)))
    elif b.dtype == tl.float32:
        b0, b1, b2 = split_terms(b)
        acc = tl.dot(a, b0, tl.dot(a, b1, tl.dot(a, b2, acc)))
    else:
        acc = tl.dot(a, b, acc)
    return acc


@jit()
def tile_product(
    a, b, a_inside, b_inside, first, last, A_STEP: tl.constexpr, B_STEP: tl.constexpr, SEGMENT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, OPERAND: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """FP32 [BLOCK_M, BLOCK_N]: sum over first <= k < last of a[:, k] b[k, :], operands as `accumulate_fp32` takes them.

    a, b: pointers [BLOCK_M, BLOCK_K] and [BLOCK_K, BLOCK_N] to the elements at k = first, A_STEP and B_STEP elements
    from one k to the next; a_inside [BLOCK_M, 1], b_inside [1, BLOCK_N]: rows and columns that exist. EVEN: BLOCK_K
    divides last - first > 0. SEGMENT: a multiple of BLOCK_K; that many terms at a time are summed from zero, then added
    to the total, ascending. So programs that do one segment each (SEGMENT None, first and last its ends) and add up
    their results in that order get the same bits as one that does them all.
    """
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    acc = total
    # At least one step, all masked if there is none to take: where a loop may be skipped, every dot is waited for.
    for step in range(tl.maximum(tl.cdiv(last - first, BLOCK_K), 1)):
        left = last - first - step * BLOCK_K
        if EVEN:
            x, y = tl.load(a, mask=a_inside, other=0.0), tl.load(b, mask=b_inside, other=0.0)
        else:
            x = tl.load(a, mask=a_inside & (k < left)[None, :], other=0.0)
            y = tl.load(b, mask=b_inside & (k < left)[:, None], other=0.0)
        acc = accumulate_fp32(x, y, acc, OPERAND)
        a += BLOCK_K * A_STEP
        b += BLOCK_K * B_STEP
        if SEGMENT is not None:  # noqa: SIM102 (known when it is compiled; the next is not)
            # One loop with a branch, not a loop in a loop: loads run on across the segment's end.
            if (step + 1) * BLOCK_K % SEGMENT == 0:
                total += acc
                acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    return total + acc


@jit()
def grouped_tile(program, rows, columns, GROUP: tl.constexpr):
    """Row and column of a tile among rows x columns tiles: GROUP rows at a time, down each column, then the next."""
    group = program // (GROUP * columns)
    height = tl.minimum(rows - group * GROUP, GROUP)
    place = program % (GROUP * columns)
    return group * GROUP + place % height, place // height
