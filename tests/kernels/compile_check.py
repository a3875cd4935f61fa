"""Compile Triton kernels for a GPU that is not present, and read the assembler's report: registers, spills, opcodes.

    from compile_check import assert_fits, compile_for
    found = compile_for(kernel, {"X": "*bf16", "N": "i32"}, {"BLOCK": 128}, arch=90, num_warps=8)
    assert_fits(found)                       # no spills, shared memory within the limit
    assert found["HGMMA"]                    # the instructions that this kernel should use

The triton wheel contains ptxas, cuobjdump and nvdisasm, so this needs neither a GPU nor CUDA. The kernels must be
imported without TRITON_INTERPRET. It says nothing about correctness, hangs or speed."""

import os
import pathlib
import re
import subprocess
import tempfile

import pytest

SMEM = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}     # A100; H100, H200; B200: shared memory of a program
OPCODES = "HMMA", "HGMMA", "LDGSTS", "UTMALDG", "LDL", "STL"


def compile_for(kernel, signature, constants, arch, num_warps=4, num_stages=3, unaligned=()):
    """-> {reg, stack, smem, warps, wide, arch, stages, waits, loops and a count of every opcode above}. `wide` counts
    loads and stores of 16 bytes per thread. `waits`: of each wait for asynchronous copies, how many may still be under
    way; only 0 means that a loop does not load ahead. `loops`: of each innermost loop, instructions and spills (LDL,
    STL), in the order of the code.

    signature: {argument: "*bf16", "*i32", "i32", "i64", "fp32" ...}; constants: {argument: value} of the constexprs,
    with None for a missing pointer. Pointers and integers are assumed to be multiples of 16, which Triton usually finds
    at run time; name the others (a number of rows, a stride) in `unaligned`."""
    triton = pytest.importorskip("triton", reason="no Triton on this system")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("interpreted kernels cannot be compiled")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    assert signature.keys() | constants.keys() == set(kernel.arg_names), \
        f"missing or unknown: {signature.keys() ^ constants.keys() ^ set(kernel.arg_names)}"
    full = {a: signature.get(a, "constexpr") for a in kernel.arg_names}
    hints = {(i,): [["tt.divisibility", 16]] for i, (a, t) in enumerate(full.items())
             if (t[0] == "*" or t in ("i32", "i64")) and a not in unaligned}
    built = triton.compile(ASTSource(kernel, full, constants, hints), target=GPUTarget("cuda", arch, 32),
                           options={"num_warps": num_warps, "num_stages": num_stages})
    tools = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(built.asm["cubin"])
        f.flush()
        usage, sass = (subprocess.run([tools / "cuobjdump", flag, f.name], capture_output=True, text=True, check=True)
                       .stdout for flag in ("-res-usage", "-sass"))
    found = {k.lower(): int(v) for k, v in re.findall(r"(REG|STACK):(\d+)", usage)}
    found |= {op: len(re.findall(rf"\b{op}\b", sass)) for op in OPCODES}
    return found | {"wide": len(re.findall(r"\b(?:LDG|STG|LDGSTS)\S*\.128", sass)), "arch": arch,
                    "smem": built.metadata.shared, "warps": built.metadata.num_warps, "stages": num_stages,
                    "waits": [int(n) for n in re.findall(r"async_wait.*?num = (\d+)", built.asm["ttgir"])],
                    "loops": inner_loops(sass)}


def inner_loops(sass):
    """-> [(instructions, spills)]: a branch to an earlier address ends a loop; a loop around another one is left out,
    and so is the branch to itself that pads the end of the code."""
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;/]+?)\s*;", sass)]
    back = [(int(to[1], 16), at) for at, text in code
            if re.search(r"\bBRA\b", text) and (to := re.search(r"0x([0-9a-f]+)", text)) and int(to[1], 16) < at]
    inner = [(a, b) for a, b in back if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in back)]
    bodies = [[text for at, text in code if a <= at <= b] for a, b in inner]
    return [(len(body), sum(bool(re.search(r"\b(LDL|STL)\b", text)) for text in body)) for body in bodies]


def assert_fits(found):
    """No register spills to memory, and the GPU has enough shared memory."""
    assert found["stack"] == found["LDL"] == found["STL"] == 0, f"spills: {found}"
    assert found["smem"] <= SMEM[found["arch"]], f"more shared memory than {SMEM[found['arch']]}: {found}"
