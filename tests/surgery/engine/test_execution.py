"""The executor: whole or not at all, resumable anywhere, the same bytes however it is run."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.forks import Fork
from torch import Tensor

import surgery.checkpoint.reader
from surgery.checkpoint.reader import TensorInput
from surgery.checkpoint.resolve import open_checkpoint
from surgery.engine.execution import execute
from surgery.engine.kernel import Kernel
from surgery.engine.options import ExecutionOptions
from surgery.engine.plan import Plan, PlannedTensor, copy_tensor, plan_files
from surgery.engine.result import ExecutionResult
from surgery.engine.storage.journal import NAME as JOURNAL
from surgery.errors import SurgeryError
from surgery.runtime import environment as process
from surgery.vectors.application import transfer
from surgery.vectors.kernels import ADD_DIFFERENCE

ROLES = ("target", "tuned", "base")


@pytest.fixture
def small_segments(monkeypatch: pytest.MonkeyPatch) -> int:
    """Segments of 64 elements: tiny tensors then take many."""
    segment = 64
    for module in ("surgery.checkpoint.reader", "surgery.engine.work.computation", "surgery.engine.plan"):
        monkeypatch.setattr(f"{module}.SEGMENT", segment)
    return segment


def write_models(folder: Path, *, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.bfloat16) -> None:
    """target, tuned and base of the same shapes; an integer buffer that no arithmetic touches beside them."""
    generator = torch.Generator().manual_seed(0)
    for role in ROLES:
        tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
        tensors["buffer"] = torch.arange(70, dtype=torch.int64)
        save_file(tensors, folder / f"{role}.safetensors", metadata={"format": "pt"})


def plan_transfer(folder: Path, scale: float = 1.0) -> Plan:
    sources = {role: open_checkpoint(folder / f"{role}.safetensors") for role in ROLES}
    planned = [
        PlannedTensor(
            name,
            tensor.dtype,
            tensor.shape,
            tuple(TensorInput(sources[role].tensors[name]) for role in ROLES),
            ADD_DIFFERENCE,
            {"scale": scale},
        )
        if tensor.is_float
        else copy_tensor(tensor)
        for name, tensor in sources["target"].tensors.items()
    ]
    return Plan({"name": "test"}, sources, plan_files(planned, like=sources["target"]))


def run(plan: Plan, out: Path, **options: object) -> ExecutionResult:
    return execute(plan, out, ExecutionOptions(**options), finish=lambda folder, outcome: outcome)  # type: ignore[arg-type]


BUFFER_BYTES = 70 * 8  # the integer buffer comes first in the file, in two segments
SHAPES = {"a": (40, 33), "b": (7,), "c": (), "d": (3, 5, 11), "empty": (0, 4)}


def test_result_is_the_float64_reference_rounded_once(tmp_path: Path, small_segments: int) -> None:
    write_models(tmp_path, shapes=SHAPES)
    run(plan_transfer(tmp_path, 0.3), tmp_path / "out")
    target, tuned, base = (load_file(tmp_path / f"{role}.safetensors") for role in ROLES)
    made = load_file(tmp_path / "out/target.safetensors")
    for name in SHAPES:
        exact = target[name].double() + 0.3 * (tuned[name].double() - base[name].double())
        ulp = torch.finfo(torch.bfloat16).eps * exact.abs() / 2
        # Half an ulp of the one rounding, and the fp32 roundings before it.
        assert ((made[name].double() - exact).abs() <= ulp * (1 + 1e-3) + 1e-6).all()
    assert torch.equal(made["buffer"], target["buffer"])


@given(threads=st.integers(1, 5), block=st.integers(1, 100), segment=st.integers(1, 200))
@settings(max_examples=15, deadline=None)
def test_bytes_do_not_depend_on_threads_or_chunks(
    threads: int, block: int, segment: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("determinism")
    write_models(folder, shapes=SHAPES)
    with pytest.MonkeyPatch.context() as patch:
        for module in ("surgery.checkpoint.reader", "surgery.engine.work.computation", "surgery.engine.plan"):
            patch.setattr(f"{module}.SEGMENT", segment)
        patch.setattr("surgery.engine.work.computation.BLOCK", block)
        run(plan_transfer(folder), folder / "odd", threads=threads)
    run(plan_transfer(folder), folder / "plain", threads=1)
    assert (folder / "odd/target.safetensors").read_bytes() == (folder / "plain/target.safetensors").read_bytes()


def test_hashes_and_sums_do_not_depend_on_threads_or_forks(
    tmp_path: Path, small_segments: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_models(tmp_path, shapes=SHAPES)
    one = run(plan_transfer(tmp_path), tmp_path / "one", threads=1)
    four = run(plan_transfer(tmp_path), tmp_path / "four", threads=4)
    assert one == four
    monkeypatch.setattr(process, "_cli_process", True)
    assert run(plan_transfer(tmp_path), tmp_path / "forked", threads=2) == one
    assert (tmp_path / "forked/target.safetensors").read_bytes() == (tmp_path / "one/target.safetensors").read_bytes()
    assert set(one.source_hashes["tuned"]) == set(SHAPES)


def test_untouched_files_keep_every_byte(tmp_path: Path) -> None:
    write_models(tmp_path, shapes=SHAPES)
    source = open_checkpoint(tmp_path / "target.safetensors")
    plan = Plan(
        {"name": "copy"},
        {"target": source},
        plan_files([copy_tensor(t) for t in source.tensors.values()], like=source),
    )
    run(plan, tmp_path / "out")
    assert (tmp_path / "out/target.safetensors").read_bytes() == (tmp_path / "target.safetensors").read_bytes()


def test_copies_survive_file_systems_that_cannot_copy_in_the_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", refuse)
    test_untouched_files_keep_every_byte(tmp_path)


KILLED = textwrap.dedent(
    """
    import os, signal, sys
    from pathlib import Path
    sys.path[:0] = [{tests!r}]
    for module in ("surgery.checkpoint.reader", "surgery.engine.work.computation", "surgery.engine.plan"):
        setattr(__import__(module, fromlist=["SEGMENT"]), "SEGMENT", 64)
    from surgery.engine.execution import execute
    from surgery.engine.options import ExecutionOptions
    from test_execution import plan_transfer
    countdown, parent = int(sys.argv[2]), os.getpid()
    if sys.argv[3] == "forks":
        from surgery.runtime import environment as process
        process.configure_cli_process()
    def counted(call):
        def wrapper(*arguments, **keywords):
            global countdown
            countdown -= 1
            if countdown == 0:
                os.kill(parent, signal.SIGKILL)
                os.kill(os.getpid(), signal.SIGSTOP)  # a worker goes no further: its parent's end is its own
            return call(*arguments, **keywords)
        return wrapper
    for name in ("pwrite", "write", "fsync", "rename", "unlink", "copy_file_range"):
        setattr(os, name, counted(getattr(os, name)))
    import surgery.engine.storage.journal
    surgery.engine.storage.journal.Journal.append = counted(surgery.engine.storage.journal.Journal.append)
    folder = Path(sys.argv[1])
    execute(plan_transfer(folder), folder / "out", ExecutionOptions(threads=2), finish=lambda f, o: None)
    print("finished")
    """
)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["threads", "forks"])
def test_killed_at_any_write_it_resumes_to_identical_bytes(tmp_path: Path, form: str) -> None:
    write_models(tmp_path, shapes=SHAPES)
    script = KILLED.format(tests=str(Path(__file__).parent))
    generator = random.Random(0)

    def attempt(countdown: int) -> tuple[int, str]:
        code, _, complaints = Fork(script, tmp_path, countdown, form).wait(120)
        return code, complaints

    kills = 0
    writes = 90 if form == "threads" else 30  # each process counts its own
    for countdown in [1, 2, *generator.sample(range(3, writes), 8)]:
        code, complaints = attempt(countdown)
        if code == 0:
            break
        assert code == -signal.SIGKILL, complaints
        assert not (tmp_path / "out").exists()
        kills += 1
    else:
        assert attempt(10**9)[0] == 0
    assert kills >= 3
    assert not (tmp_path / "out.partial").exists()
    with pytest.MonkeyPatch.context() as patch:
        for module in ("surgery.checkpoint.reader", "surgery.engine.work.computation", "surgery.engine.plan"):
            patch.setattr(f"{module}.SEGMENT", 64)
        run(plan_transfer(tmp_path), tmp_path / "uninterrupted")
    assert [p.name for p in sorted((tmp_path / "out").iterdir())] == ["target.safetensors"]
    assert (tmp_path / "out/target.safetensors").read_bytes() == (
        tmp_path / "uninterrupted/target.safetensors"
    ).read_bytes()


class StoppedError(Exception):
    pass


def interrupt_after(monkeypatch: pytest.MonkeyPatch, segments: int) -> None:
    """Makes the journal raise once it holds `segments` lines."""
    append = surgery.engine.storage.journal.Journal.append
    left = segments

    def counted(
        self: surgery.engine.storage.journal.Journal, record: surgery.engine.storage.journal.SegmentRecord
    ) -> None:
        nonlocal left
        if left == 0:
            raise StoppedError
        left -= 1
        append(self, record)

    monkeypatch.setattr(surgery.engine.storage.journal.Journal, "append", counted)


def test_what_was_written_before_is_kept_and_counted(
    tmp_path: Path, small_segments: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_models(tmp_path, shapes=SHAPES)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 10)
        with pytest.raises(StoppedError):
            run(plan_transfer(tmp_path), tmp_path / "out", threads=1)
    resumed = run(plan_transfer(tmp_path), tmp_path / "out", threads=1)
    fresh = run(plan_transfer(tmp_path), tmp_path / "fresh", threads=1)
    assert resumed.resumed_bytes == BUFFER_BYTES + 8 * small_segments * 2
    assert (resumed.hashes, resumed.sums, resumed.source_hashes) == (
        fresh.hashes,
        fresh.sums,
        fresh.source_hashes,
    )


def test_segments_lost_by_a_power_cut_are_written_again(
    tmp_path: Path, small_segments: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_models(tmp_path, shapes=SHAPES)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 10)
        with pytest.raises(StoppedError):
            run(plan_transfer(tmp_path), tmp_path / "out", threads=1)
    weights = tmp_path / "out.partial/target.safetensors"
    data = bytearray(weights.read_bytes())
    start = plan_transfer(tmp_path).files[0].header.data_start
    data[start : start + 2000] = bytes(2000)  # the journal reached the disk, the data did not
    weights.write_bytes(data)
    run(plan_transfer(tmp_path), tmp_path / "out")
    run(plan_transfer(tmp_path), tmp_path / "fresh")
    assert (tmp_path / "out/target.safetensors").read_bytes() == (tmp_path / "fresh/target.safetensors").read_bytes()


def test_writing_past_the_page_cache_gives_the_same_bytes_also_after_a_kill(
    tmp_path: Path, small_segments: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_models(tmp_path, shapes=SHAPES)
    run(plan_transfer(tmp_path), tmp_path / "buffered")
    monkeypatch.setattr("surgery.engine.storage.writer.DIRECT_FROM", 1)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 10)
        with pytest.raises(StoppedError):
            run(plan_transfer(tmp_path), tmp_path / "resumed", threads=1)
    for name in ("resumed", "fresh"):
        run(plan_transfer(tmp_path), tmp_path / name, threads=3)
        written = (tmp_path / name / "target.safetensors").read_bytes()
        assert written == (tmp_path / "buffered/target.safetensors").read_bytes()


def test_a_journal_line_cut_short_is_ignored(
    tmp_path: Path, small_segments: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_models(tmp_path, shapes=SHAPES)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        with pytest.raises(StoppedError):
            run(plan_transfer(tmp_path), tmp_path / "out", threads=1)
    journal = tmp_path / "out.partial" / JOURNAL
    journal.write_bytes(journal.read_bytes()[:-7])
    outcome = run(plan_transfer(tmp_path), tmp_path / "out", threads=1)
    assert outcome.resumed_bytes == BUFFER_BYTES + 2 * small_segments * 2


def test_another_jobs_partial_output_is_refused_and_discarded_on_demand(
    tmp_path: Path, small_segments: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_models(tmp_path, shapes=SHAPES)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        with pytest.raises(StoppedError):
            run(plan_transfer(tmp_path, scale=1.0), tmp_path / "out")
    with pytest.raises(SurgeryError, match="unfinished output of another job"):
        run(plan_transfer(tmp_path, scale=0.5), tmp_path / "out")
    outcome = run(plan_transfer(tmp_path, scale=0.5), tmp_path / "out", overwrite=True)
    assert outcome.resumed_bytes == 0


def test_nothing_of_a_discarded_job_reaches_the_output(tmp_path: Path) -> None:
    write_models(tmp_path, shapes=SHAPES)
    partial = tmp_path / "out.partial"
    (partial / "donor").mkdir(parents=True)
    (partial / "model-00002-of-00002.safetensors").write_text("stale")
    (tmp_path / ".out.lock").touch()  # beside it the folder is known to be ours
    with pytest.raises(SurgeryError, match="unfinished output of another job"):
        run(plan_transfer(tmp_path), tmp_path / "out")
    run(plan_transfer(tmp_path), tmp_path / "out", overwrite=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["target.safetensors"]


def test_an_output_killed_just_before_its_rename_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_models(tmp_path, shapes=SHAPES)

    def manifest(folder: Path, outcome: ExecutionResult) -> None:
        (folder / "surgery.json").write_text("{}")

    def killed(*_: object, **__: object) -> None:
        raise StoppedError

    with monkeypatch.context() as patch:
        # After the folder was found complete, when the journal is deleted.
        patch.setattr("surgery.io.output_folder.remove_path", killed)
        with pytest.raises(StoppedError):
            execute(plan_transfer(tmp_path), tmp_path / "out", ExecutionOptions(), finish=manifest)
    assert not (tmp_path / "out.partial").exists() and (tmp_path / "out.complete").is_dir()
    execute(plan_transfer(tmp_path), tmp_path / "out", ExecutionOptions(), finish=manifest)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["surgery.json", "target.safetensors"]
    assert not list(tmp_path.glob("*out*.*"))


def test_writes_that_are_cut_short_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_models(tmp_path, shapes=SHAPES)
    run(plan_transfer(tmp_path), tmp_path / "whole")
    write = os.pwrite

    def halve(descriptor: int, data: memoryview | bytes, position: int) -> int:
        return write(descriptor, memoryview(data)[: max(len(data) // 2, 1)], position)

    monkeypatch.setattr(os, "pwrite", halve)
    run(plan_transfer(tmp_path), tmp_path / "out")
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_two_processes_never_write_one_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_models(tmp_path, shapes=SHAPES)

    def nested(folder: Path, outcome: ExecutionResult) -> None:
        run(plan_transfer(tmp_path), tmp_path / "out")

    with pytest.raises(SurgeryError, match="another process is writing"):
        execute(plan_transfer(tmp_path), tmp_path / "out", ExecutionOptions(), finish=nested)


def test_an_existing_output_is_never_touched_without_overwrite(tmp_path: Path) -> None:
    write_models(tmp_path, shapes=SHAPES)
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    with pytest.raises(SurgeryError, match="exists already") as caught:
        run(plan_transfer(tmp_path), out)
    assert caught.value.exit_code == 2
    with pytest.raises(SurgeryError, match="was not written by this tool"):
        run(plan_transfer(tmp_path), out, overwrite=True)
    assert (out / "precious").read_text() == "x"
    assert not (tmp_path / "out.partial").exists()


def test_overwrite_replaces_our_own_output(tmp_path: Path) -> None:
    write_models(tmp_path, shapes=SHAPES)

    def manifest(folder: Path, outcome: ExecutionResult) -> None:
        (folder / "surgery.json").write_text("{}")

    execute(plan_transfer(tmp_path, 1.0), tmp_path / "out", ExecutionOptions(), finish=manifest)
    before = (tmp_path / "out/target.safetensors").read_bytes()
    execute(plan_transfer(tmp_path, 0.5), tmp_path / "out", ExecutionOptions(overwrite=True), finish=manifest)
    assert (tmp_path / "out/target.safetensors").read_bytes() != before
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["out"]


def test_a_source_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    write_models(tmp_path, shapes=SHAPES)
    plan = plan_transfer(tmp_path)

    def touch(first: Sequence[Tensor], *, scale: float) -> Tensor:
        os.utime(tmp_path / "base.safetensors", ns=(1, 1))
        return first[0]

    kernel = Kernel("touch", touch)
    tensors = [
        PlannedTensor(t.name, t.dtype, t.shape, t.inputs, kernel, t.params) if t.kernel else t for t in plan.tensors
    ]
    changed = Plan(plan.command, plan.sources, plan_files(tensors, like=plan.sources["target"]))
    with pytest.raises(SurgeryError, match="changed while it was being read"):
        run(changed, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_midway_says_so_and_the_run_goes_on_later(
    tmp_path: Path, small_segments: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_models(tmp_path, shapes=SHAPES)
    pwrite, left = os.pwrite, 8

    def full(descriptor: int, data: bytes, position: int) -> int:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(descriptor, data, position)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(SurgeryError, match=r"the disk is full. Free some space and run the same command again"):
            run(plan_transfer(tmp_path), tmp_path / "out", threads=1)
    assert run(plan_transfer(tmp_path), tmp_path / "out").resumed_bytes > 0


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_values_stop_the_job_unless_allowed(tmp_path: Path, value: float) -> None:
    write_models(tmp_path, shapes=SHAPES)
    tensors = load_file(tmp_path / "tuned.safetensors")
    tensors["a"][3, 4] = value
    save_file(tensors, tmp_path / "tuned.safetensors")
    with pytest.raises(SurgeryError, match=r"a: 1 of 1,320 values .* are NaN or infinite"):
        run(plan_transfer(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    outcome = run(plan_transfer(tmp_path), tmp_path / "out", allow_nonfinite=True)
    assert outcome.total("nonfinite") == 1


def test_huge_but_finite_values_are_no_error(tmp_path: Path) -> None:
    write_models(tmp_path, shapes={"a": (10,)}, dtype=torch.float32)
    tensors = load_file(tmp_path / "target.safetensors")
    tensors["a"][0] = 3e38  # its square overflows fp32
    save_file(tensors, tmp_path / "target.safetensors")
    assert run(plan_transfer(tmp_path), tmp_path / "out").total("nonfinite") == 0


def test_f64_is_computed_in_f64(tmp_path: Path) -> None:
    write_models(tmp_path, shapes={"a": (50,)}, dtype=torch.float64)
    run(plan_transfer(tmp_path), tmp_path / "out")
    target, tuned, base = (load_file(tmp_path / f"{role}.safetensors")["a"] for role in ROLES)
    assert torch.equal(load_file(tmp_path / "out/target.safetensors")["a"], (tuned - base) * 1.0 + target)


def test_whole_kernels_see_shapes_and_share_one_call(tmp_path: Path, small_segments: int) -> None:
    write_models(tmp_path, shapes={"a": (12, 20)}, dtype=torch.float32)
    calls = []

    def split(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        calls.append(tensors[0].shape)
        return tensors[0].T.contiguous(), tensors[0].sum(dim=0)

    source = open_checkpoint(tmp_path / "base.safetensors")
    inputs = (TensorInput(source.tensors["a"]),)
    kernel = Kernel("split", split, "whole")
    tensors = [
        PlannedTensor("turned", "F32", (20, 12), inputs, kernel, part=0),
        PlannedTensor("sums", "F32", (20,), inputs, kernel, part=1),
    ]
    run(Plan({"name": "x"}, {"base": source}, plan_files(tensors)), tmp_path / "out")
    made, held = load_file(tmp_path / "out/model.safetensors"), load_file(tmp_path / "base.safetensors")["a"]
    assert torch.equal(made["turned"], held.T) and torch.equal(made["sums"], held.sum(dim=0))
    assert calls == [(12, 20)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_bytes_of_the_cpu(tmp_path: Path, small_segments: int) -> None:
    write_models(tmp_path, shapes=SHAPES)
    run(plan_transfer(tmp_path, 0.7), tmp_path / "cpu")
    run(plan_transfer(tmp_path, 0.7), tmp_path / "gpu", device="cuda")
    assert (tmp_path / "cpu/target.safetensors").read_bytes() == (tmp_path / "gpu/target.safetensors").read_bytes()


def test_a_device_that_is_not_there_is_named(tmp_path: Path) -> None:
    write_models(tmp_path, shapes=SHAPES)
    with pytest.raises(SurgeryError, match="expected cpu or cuda"):
        run(plan_transfer(tmp_path), tmp_path / "out", device="quantum")
    if not torch.cuda.is_available():
        with pytest.raises(SurgeryError, match="no CUDA device is available"):
            run(plan_transfer(tmp_path), tmp_path / "out", device="cuda")


@pytest.mark.slow
def test_a_command_killed_at_random_times_resumes_to_the_same_hashes(tmp_path: Path) -> None:
    """The real command in a real process, killed by the clock instead of by the call."""
    write_models(tmp_path, shapes={f"layer.{i}.weight": (600, 700) for i in range(12)})
    arguments = [str(tmp_path / f"{role}.safetensors") for role in ("tuned", "base", "target")]
    command = [
        sys.executable,
        "-c",
        "from cli.main import run; run()",
        "vector",
        "transfer",
        *arguments,
        "--allow-unrelated",
    ]
    out = tmp_path / "out"
    generator = random.Random(1)
    for _ in range(6):
        process = subprocess.Popen(
            [*command, "-o", str(out), "--threads", "1"], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        try:
            process.wait(timeout=1.0 + 1.5 * generator.random())
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if out.exists():
            break
    else:
        subprocess.run([*command, "-o", str(out)], check=True, capture_output=True)
    tuned, base, target = arguments
    transfer(tuned, base, target, tmp_path / "whole", allow_unrelated=True)
    for name in ("target.safetensors", "surgery.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
