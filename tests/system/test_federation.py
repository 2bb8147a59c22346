"""The main job, for real: a server, two sites and an evaluator fine-tune the embedded model with DeepSpeed.

In one federation everything is killed that can be, between and within rounds; what comes out must still be right.
"""

import json
import os
import signal
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import psutil
import pytest
import torch
import torch.nn.functional as F  # noqa: N812  # as everyone names it
from peft import PeftModel
from tests.system.harness import ServerProcess
from transformers import AutoModelForCausalLM, AutoTokenizer

from fsllm.v1.control_pb2 import Commit, GetRunRequest, Run, RunStatus, SubmitRunRequest, WatchRunRequest
from fsllm.v1.control_pb2 import WatchRunResponse as RunEvent
from fsllm_bench.embedded import model_path
from fsllm_bench.embedded.tasks import write_federation

# transformers and PEFT warn of each other.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")]

PLAN = {
    "name": "ward",
    "rounds": 4,
    "model": {"name": "embedded"},
    "adapter": {"kind": "lora", "rank": 4, "alpha": 8},
    "cohort": {"quorum": 2},
    "timing": {"gather_seconds": 1, "idle_seconds": 60},
    "train": {"steps": 8, "batch_size": 16, "learning_rate": 5e-3, "precision": "fp32"},
    "deepspeed": {"zero_stage": 2},
    "data": {"template": "brief", "max_length": 128},
    "wire": {"element_type": "fp32"},
    "evaluate": {"metrics": ["loss", "exact_match"], "limit": 60, "max_new_tokens": 8},
}
HELD_OUT = 60
WAIT = 240.0


class Site:
    """A daemon that can be killed and started again over the same state."""

    def __init__(self, server: ServerProcess, folder: Path, name: str, data: Path, role: str = "site") -> None:
        self.name = name
        self._server = server
        self._state = folder / name
        self._log = folder / f"{name}.log"
        self._data = data
        join = folder / f"{name}.join"
        fsllm(server, "site", "invite", name, "--role", role, "--host", "localhost", "-o", str(join))
        self.start("--join", str(join))

    def start(self, *arguments: str) -> None:
        command = [
            f"{sysconfig.get_path('scripts')}/fsllm-client",
            *("--server", self._server.address, "--data", str(self._data), "--state-dir", str(self._state)),
            *("--metrics-port", "0", *arguments),
        ]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def restart(self) -> None:
        self.kill()
        self.start()

    def kill_trainer(self) -> None:
        workers = [
            child
            for child in psutil.Process(self._process.pid).children(recursive=True)
            if any("fsllm_client.trainer" in word for word in child.cmdline())
        ]
        assert workers, "no trainer to kill"
        for worker in workers:
            worker.send_signal(signal.SIGKILL)

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            self._process.wait(30)

    @property
    def log(self) -> str:
        return self._log.read_text()


def fsllm(server: ServerProcess, *arguments: str) -> str:
    done = subprocess.run(
        [f"{sysconfig.get_path('scripts')}/fsllm", *arguments],
        env=os.environ | {"FSLLM_STATE_DIR": str(server.state)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def events(server: ServerProcess, run: str) -> Iterator[RunEvent]:
    """Watch a run to its end, across restarts of the server."""
    after = 0
    while True:
        try:
            for event in server.control().WatchRun(WatchRunRequest(run_id=run, after_sequence=after), timeout=WAIT):
                after = max(after, event.sequence)
                yield event
        except grpc.RpcError as error:
            assert error.code() is grpc.StatusCode.UNAVAILABLE, error  # noqa: PT017  # it goes on
        else:
            return


def held_out(commit: Commit) -> dict[str, float]:
    (metrics,) = [m.metrics for m in commit.metrics if m.role == "evaluator"]
    return {metric.name: metric.value for metric in metrics}


def test_a_federation_survives_every_kill_and_its_adapter_is_what_was_reported(tmp_path: Path) -> None:
    files = write_federation(tmp_path / "data", 0)
    evaluated = tmp_path / "held-out.jsonl"
    evaluated.write_text("".join(files.heldout.read_text().splitlines(keepends=True)[:HELD_OUT]))
    with ExitStack() as stack:
        server = stack.enter_context(ServerProcess(tmp_path / "server"))
        sites = {
            name: Site(server, tmp_path, name, path)
            for name, path in (("hospital-a", files.train["hospital-a"]), ("hospital-b", files.train["hospital-b"]))
        }
        evaluator = Site(server, tmp_path, "evaluator", evaluated, role="evaluator")
        for site in (*sites.values(), evaluator):
            stack.callback(site.close)
        run = (
            server.control()
            .SubmitRun(SubmitRunRequest(plan=json.dumps(PLAN).encode(), request_id="once"), timeout=30)
            .run.run_id
        )
        killed: set[str] = set()
        commits: list[int] = []
        for event in events(server, run):
            training = event.kind == "progress" and event.progress.activity == "training"
            if training and event.round == 1 and event.subject == "hospital-a" and "trainer" not in killed:
                killed.add("trainer")
                sites["hospital-a"].kill_trainer()
            if event.kind == "commit":
                commits.append(event.round)
                if event.round == 2 and "server" not in killed:
                    killed.add("server")
                    server.kill()
                    server.restart()
            if training and event.round == 4 and event.subject == "hospital-b" and "client" not in killed:
                killed.add("client")
                sites["hospital-b"].restart()
        final = server.control().GetRun(GetRunRequest(run_id=run), timeout=30).run
        logs = "\n".join(site.log for site in sites.values())
        assert killed == {"trainer", "server", "client"}, logs
        assert final.status == RunStatus.RUN_STATUS_DONE, final.message
        assert commits == sorted(set(commits)), "a round was committed twice"
        _check_rounds(final)
        fsllm(server, "run", "export", "ward", "-o", str(tmp_path / "adapter"))
        evaluator.close()
    loss, right = _measure(tmp_path / "adapter", evaluated)
    reported = held_out(final.commits[-1])
    assert loss == pytest.approx(reported["loss"], rel=1e-3)
    assert right == pytest.approx(reported["exact_match"], abs=1.5 / HELD_OUT)


def _check_rounds(run: Run) -> None:
    assert [commit.round for commit in run.commits] == [0, 1, 2, 3, 4]
    for commit in run.commits[1:]:
        members = [contribution.member for contribution in commit.contributions]
        assert members, f"round {commit.round} has no update"
        assert members == sorted(set(members)), "an update counted twice"
        assert sum(contribution.weight for contribution in commit.contributions) == pytest.approx(1)
    # In between the evaluator may have been away, when the server had just come back.
    before, after = held_out(run.commits[0])["loss"], held_out(run.commits[-1])["loss"]
    assert after < before / 2, (before, after)


def _measure(adapter: Path, rows: Path) -> tuple[float, float]:
    """Return (loss an answer token, exact match) in plain transformers and PEFT, one row at a time."""
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    base = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
    model = PeftModel.from_pretrained(base, adapter).eval()
    total, tokens, right = 0.0, 0, 0
    for line in rows.read_text().splitlines():
        row = json.loads(line)
        text = "".join(f"{part}\n" for part in (row["instruction"], row["input"]) if part)
        prompt = tokenizer(f"### Instruction:\n{text}### Response:\n", add_special_tokens=False)["input_ids"]
        if tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]:
            prompt = [tokenizer.bos_token_id, *prompt]
        answer = [*tokenizer(row["output"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            total += float(F.cross_entropy(logits, torch.tensor(answer), reduction="sum"))
            generated = model.generate(
                input_ids=torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=8,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
            )
        tokens += len(answer)
        right += tokenizer.decode(generated[0, len(prompt) :], skip_special_tokens=True).strip() == row["output"]
    return total / tokens, right / len(rows.read_text().splitlines())
