"""Clients that leave, servers that are stopped and killed, too much work: what is lost, and what it costs.

    python tools/serve_chaos.py BUNDLE --leave 10000 --stops 100 --kills 100 --overload 600

Every server is forked from this process, which has imported everything and run nothing, and asks it.
Exit code 1 if anything was lost: an accepted request without an answer, a job that is not there once with its
images, a server that did not end as it should.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import onnxruntime
import uvicorn
from PIL import Image

import admtrt.cli
import admtrt.runtime.backends.opening
import admtrt.serve.app
import admtrt.serve.server

IMPORTED = (
    onnxruntime,
    uvicorn,
    Image,
    admtrt.runtime.backends.opening,
    admtrt.serve.app,
    admtrt.serve.server,
)


class Server:
    """A forked server."""

    def __init__(self, bundle: Path, *options: str) -> None:
        reading, writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(reading)
            os.dup2(writing, 1)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            fixed = ["serve", str(bundle), "--port", "0", "--json", "--threads", "1", "--drain-grace", "0"]
            code = 1
            try:
                code = admtrt.cli.run([*fixed, *options])
            finally:
                os._exit(code)
        os.close(writing)
        with os.fdopen(reading) as told:
            line = told.readline()
        assert line, "the server did not start"
        self.url = json.loads(line)["url"]
        self.port = int(self.url.rpartition(":")[2])

    def end(self, number: int) -> int:
        """Signal it, and wait for its end; its exit code, negative for a signal."""
        os.kill(self.pid, number)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    @property
    def memory(self) -> int:
        """Resident bytes."""
        pages = Path(f"/proc/{self.pid}/statm").read_text().split()[1]
        return int(pages) * resource.getpagesize()


async def ask(
    port: int, method: str, path: str, body: Any = None, *, leave: float | None = None
) -> tuple[int, bytes]:
    """Status and body; (0, b"") where the connection broke, (-1, b"") where we left."""
    content = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
    head += "content-type: application/json\r\n"
    writer = None
    try:
        async with asyncio.timeout(leave):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
            status = int((await reader.readline()).split()[1])
            length = None
            while (line := await reader.readline()) not in (b"\r\n", b""):
                name, _, value = line.decode().partition(":")
                if name.lower() == "content-length":
                    length = int(value)
            return status, await (reader.read() if length is None else reader.readexactly(length))
    except TimeoutError:
        return -1, b""
    except (OSError, EOFError, IndexError, ValueError):
        return 0, b""
    finally:
        if writer is not None:
            writer.close()


def whole(status: int, body: bytes, *, stream: bool) -> bool:
    """True for an answer that is complete."""
    return status == 200 and (b"event: done" in body if stream else b'"images"' in body)


async def numbers(port: int) -> dict[str, float]:
    """Counters of the server by name."""
    text = (await ask(port, "GET", "/metrics"))[1].decode()
    return {
        line.partition("{")[0]: float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if line.startswith("admtrt_") and "bucket" not in line
    }


async def leaving(bundle: Path, count: int) -> dict[str, Any]:
    """Clients that leave at random moments, at most 50 at once; then a patient one."""
    server, generator, seen, gate = Server(bundle), random.Random(1), Counter[str](), asyncio.Semaphore(50)
    patient = {"classes": [1] * 4, "steps": "ddim25"}
    began = time.monotonic()
    await ask(server.port, "POST", "/v1/samples", patient)
    alone = time.monotonic() - began
    before = server.memory

    async def one(number: int) -> None:
        async with gate:
            stream = number % 2 == 0
            body = {
                "classes": [number % 3],
                "steps": generator.choice(["ddim10", "ddim50"]),
                "stream": stream,
            }
            leave = generator.choice([generator.uniform(0, 0.5), None])
            status, answer = await ask(server.port, "POST", "/v1/samples", body, leave=leave)
            kind = {-1: "left", 0: "broken", 429: "refused"}.get(status, str(status))
            seen["answered" if whole(status, answer, stream=stream) else kind] += 1

    await asyncio.gather(*map(one, range(count)))
    while (await numbers(server.port))["admtrt_requests_in_flight"]:
        await asyncio.sleep(0.05)
    began = time.monotonic()
    await ask(server.port, "POST", "/v1/samples", patient)
    after = time.monotonic() - began
    counted = await numbers(server.port)
    ends = {
        name: int(counted[f"admtrt_{name}_total"])
        for name in ("accepted", "done", "cancelled", "expired", "cut", "fault")
    }
    lost = ends["accepted"] - sum(ends.values()) + ends["accepted"]
    memory = server.memory / before
    code = server.end(signal.SIGTERM)
    return {
        "clients": dict(seen), "server": ends, "lost": lost + seen["broken"], "exit": code,
        "patient": f"{alone:.2f} s before, {after:.2f} s after", "memory": round(memory, 3),
        "failed": bool(lost or seen["broken"] or code),
    }  # fmt: skip


async def stopping(bundle: Path, count: int) -> dict[str, Any]:
    """SIGTERM in the middle of accepted work."""
    generator, totals, wrong = random.Random(2), Counter[str](), 0
    for number in range(count):
        server = Server(bundle)
        ask_one = [
            asyncio.create_task(
                ask(
                    server.port,
                    "POST",
                    "/v1/samples",
                    {"classes": [index % 3], "steps": "ddim50", "stream": index % 2 == 0},
                )
            )
            for index in range(20)
        ]
        while (await numbers(server.port)).get("admtrt_accepted_total", 0) < 20:
            await asyncio.sleep(0.005)
        await asyncio.sleep(generator.uniform(0, 0.3))
        os.kill(server.pid, signal.SIGTERM)
        answers = await asyncio.gather(*ask_one)
        code = await asyncio.to_thread(
            lambda pid=server.pid: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        )
        for index, (status, body) in enumerate(answers):
            good = whole(status, body, stream=index % 2 == 0)
            totals["finished" if good else "lost"] += 1
        wrong += code != 0
        print(f"\rstops {number + 1}/{count} {dict(totals)}", end="", file=sys.stderr, flush=True)
    return {**totals, "servers that ended otherwise": wrong, "failed": bool(totals["lost"] or wrong)}


async def killing(bundle: Path, count: int) -> dict[str, Any]:
    """Kill -9 at random moments, several in one spool; every job that was acknowledged must be there once."""
    generator, totals = random.Random(3), Counter[str]()
    folder = Path(tempfile.mkdtemp(prefix="admtrt-chaos-"))
    kills = 0
    while kills < count:
        spool = folder / str(kills)
        jobs: dict[str, list[int]] = {}
        for _ in range(min(5, count - kills)):
            server = Server(bundle, "--spool", str(spool))
            kills += 1

            async def submit(port: int = server.port, jobs: dict[str, list[int]] = jobs) -> None:
                body = {"classes": [generator.randrange(3)], "steps": "ddim25"}
                status, answer = await ask(port, "POST", "/v1/jobs", body)
                if status == 202:
                    told = json.loads(answer)
                    jobs[told["id"]] = told["seeds"]

            sending = [asyncio.create_task(submit()) for _ in range(10)]
            await asyncio.sleep(generator.uniform(0, 0.5))
            os.kill(server.pid, signal.SIGKILL)
            os.waitpid(server.pid, 0)
            await asyncio.gather(*sending)
        server = Server(bundle, "--spool", str(spool))
        for name, seeds in jobs.items():
            while json.loads((await ask(server.port, "GET", f"/v1/jobs/{name}"))[1]).get("state") in (
                "queued",
                "running",
            ):
                await asyncio.sleep(0.01)
            status, answer = await ask(server.port, "GET", f"/v1/jobs/{name}/result")
            if status != 200:
                totals["lost"] += 1
                continue
            result = json.loads(answer)
            body = {"classes": result["classes"], "seeds": seeds, "steps": "ddim25"}
            again = json.loads((await ask(server.port, "POST", "/v1/samples", body))[1])
            totals["there" if again["images"] == result["images"] else "other images"] += 1
        left = [file.name for file in spool.iterdir() if file.name.endswith(".tmp")]
        totals["left lying about"] += len(left)
        totals["servers that ended otherwise"] += server.end(signal.SIGTERM) != 0
        print(f"\rkills {kills}/{count} {dict(totals)}", end="", file=sys.stderr, flush=True)
    shutil.rmtree(folder)
    bad = sum(value for name, value in totals.items() if name != "there")
    return {"kills": kills, **totals, "failed": bool(bad)}


async def overloading(bundle: Path, seconds: float) -> dict[str, Any]:
    """Five times as many requests as can be drawn, against as many as can be."""
    server = Server(bundle, "--timeout", "2", "--client-share", "1", "--max-requests", "100000")
    body = {"classes": [1], "steps": "ddim25"}

    async def closed(until: float, done: list[float]) -> None:
        while time.monotonic() < until:
            if (await ask(server.port, "POST", "/v1/samples", body))[0] == 200:
                done.append(time.monotonic())

    done: list[float] = []
    began = time.monotonic()
    await asyncio.gather(*(closed(began + min(20, seconds), done) for _ in range(16)))
    best = len(done) / (time.monotonic() - began)
    rate, generator = 5 * best, random.Random(4)
    answered, refused, other, late, memory = 0, [], Counter[int](), 0, []
    tasks: set[asyncio.Task[None]] = set()

    async def one() -> None:
        nonlocal answered, late
        began = time.monotonic()
        status, _ = await ask(server.port, "POST", "/v1/samples", body)
        took = time.monotonic() - began
        if status == 200:
            answered += 1
            late += took > 2.5
        elif status == 429:
            refused.append(took)
        else:
            other[status] += 1

    began, at = time.monotonic(), time.monotonic()
    while (now := time.monotonic()) < began + seconds:
        while at < now:
            at += generator.expovariate(rate)
            task = asyncio.create_task(one())
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        memory.append(server.memory)
        await asyncio.sleep(0.005)
    took = time.monotonic() - began
    await asyncio.gather(*tasks)
    part = max(1, len(memory) // 10)
    health = []
    for _ in range(100):
        began = time.monotonic()
        await ask(server.port, "GET", "/health/live")
        health.append(time.monotonic() - began)
    code = server.end(signal.SIGTERM)
    refused.sort()
    return {
        "best per second": round(best, 1),
        "offered per second": round(rate, 1),
        "answered per second": round(answered / took, 1),
        "refused": len(refused),
        "refusals p99 ms": round(refused[int(0.99 * len(refused))] * 1e3, 1) if refused else None,
        "others": dict(other), "late": late, "exit": code,
        "memory, last tenth over first": round(sum(memory[-part:]) / sum(memory[:part]), 3),
        "failed": bool(code or other.get(500, 0)),
    }  # fmt: skip


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--leave", type=int, default=0, metavar="CLIENTS")
    parser.add_argument("--stops", type=int, default=0)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--overload", type=float, default=0, metavar="SECONDS")
    given = parser.parse_args()
    failed = False
    for name, run, amount in (
        ("clients that leave", leaving, given.leave), ("SIGTERM", stopping, given.stops),
        ("kill -9", killing, given.kills), ("overload", overloading, given.overload),
    ):  # fmt: skip
        if amount:
            began = time.monotonic()
            with contextlib.suppress(KeyboardInterrupt):
                told = asyncio.run(run(given.bundle, amount))  # type: ignore[operator]
                failed |= told["failed"]
                print(f"\n{name}: {json.dumps(told)} ({time.monotonic() - began:.0f} s)", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
