"""Workers and a front end find each other over a store that asks nobody who he is: only who has the secret joins."""

from __future__ import annotations

import ipaddress
import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from shardprep_runtime.errors import InputError, WorkerError
from shardprep_runtime.workers import sealed
from shardprep_runtime.workers.addresses import check_host, default_host, parse_address
from shardprep_runtime.workers.meeting import (
    ANSWER,
    MEMBER,
    MEMBERS,
    Invitation,
    Meeting,
    Membership,
    Plan,
    RefusedError,
    find_meeting,
    join,
    open_meeting,
)
from shardprep_runtime.workers.meeting import PLAN as PLAN_KEY
from shardprep_runtime.workers.sealed import MAX_MESSAGE, new_secret, seal, unseal
from shardprep_runtime.workers.transport import WorkerInfo

SECRET = "a secret that the test has made up"
OTHER = "a secret that somebody else made up"
DIGEST = "sha256:" + "0" * 64
PLAN = Plan(
    transport="links",
    stages=((0, 3), (3, 5)),
    tensor_parallel_size=2,
    dtype="bfloat16",
    manifest_digest=DIGEST,
    revision="v2",
)
INFO = WorkerInfo(
    name="stage-1",
    pp_rank=1,
    layers=(3, 5),
    host="there",
    pid=7,
    manifest_digest=DIGEST,
    nbytes=10,
    bytes_fetched=4,
    seconds={"imports": 1.5, "build": 0.25},
)


@contextmanager
def served(plan: Plan = PLAN) -> Iterator[Meeting]:
    found = open_meeting("127.0.0.1", plan=plan, secret=SECRET)
    try:
        yield found
    finally:
        found.close()


@contextmanager
def asking() -> Iterator[ThreadPoolExecutor]:
    """For workers that wait for an answer."""
    with ThreadPoolExecutor(4) as pool:
        yield pool


def ask(pool: ThreadPoolExecutor, meeting: Meeting, info: WorkerInfo = INFO) -> Future[Membership]:
    return pool.submit(join, meeting.address, info, secret=SECRET, timeout=20)


def test_a_worker_learns_the_plan_and_is_welcomed() -> None:
    plan = replace(PLAN, transport="rpc", details={"world_size": 3})
    with served(plan) as meeting, asking() as pool:
        asked = ask(pool, meeting)
        member = meeting.joined(20)
        assert member is not None
        assert member.info == INFO
        assert meeting.welcome(member) == 1
        found = asked.result()
        assert found.plan == replace(plan, nonce=meeting.plan.nonce)
        assert len(found.plan.nonce) == 32
        assert (found.name, found.number, found.rank, found.host) == (
            "stage-1",
            member.number,
            1,
            "127.0.0.1",
        )
        found.store.set("a", "b")
        assert meeting.store.get("a") == b"b"


def test_workers_of_one_name_get_different_names_and_ranks() -> None:
    with served() as meeting, asking() as pool:
        asked = [ask(pool, meeting) for _ in range(3)]
        for _ in asked:
            member = meeting.joined(20)
            assert member is not None
            meeting.welcome(member)
        found = [each.result() for each in asked]
        assert {each.name for each in found} == {"stage-1", "stage-1-2", "stage-1-3"}
        assert {each.rank for each in found} == {1, 2, 3}
        assert len({each.number for each in found}) == 3


def test_a_spare_joins_without_layers() -> None:
    with served() as meeting, asking() as pool:
        asked = ask(pool, meeting, replace(INFO, name="spare", pp_rank=None, layers=None))
        member = meeting.joined(20)
        assert member is not None
        assert member.pp_rank is None
        meeting.welcome(member)
        assert asked.result().name == "spare"


def test_a_front_end_may_refuse_whom_it_likes() -> None:
    with served() as meeting, asking() as pool:
        asked = ask(pool, meeting)
        member = meeting.joined(20)
        assert member is not None
        meeting.refuse(member, "no more are wanted\x1b[2J")
        with pytest.raises(RefusedError, match=r"refuses this worker: no more are wanted\\u001b\[2J"):
            asked.result()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (replace(INFO, manifest_digest="sha256:" + "1" * 64), "--manifest-digest"),
        (replace(INFO, layers=(3, 6)), "holds layers 3 to 5, the front end runs layers 3 to 4"),
        (replace(INFO, layers=None), "holds no layers"),
        (replace(INFO, pp_rank=2), "runs 2 stages, from 0 to 1"),
    ],
)
def test_a_worker_with_the_wrong_shard_is_refused(wrong: WorkerInfo, message: str) -> None:
    with served() as meeting, asking() as pool:
        asked = ask(pool, meeting, wrong)
        assert meeting.joined(0.5) is None
        with pytest.raises(RefusedError, match=message):
            asked.result()


def test_a_worker_with_another_secret_sees_it_in_the_plan() -> None:
    with served() as meeting, pytest.raises(RefusedError, match="set SHARDPREP_SECRET to the same text"):
        find_meeting(meeting.address, secret=OTHER, timeout=20)


def test_one_without_the_secret_is_refused_and_told_so() -> None:
    with served() as meeting, asking() as pool:
        known = find_meeting(meeting.address, secret=SECRET, timeout=20)
        stranger = Invitation(known.host, known.port, known.store, known.plan, OTHER)
        asked = pool.submit(stranger.join, INFO, timeout=20)
        assert meeting.joined(0.5) is None
        with pytest.raises(RefusedError, match="is not the front end"):
            asked.result()
        # the answer is the front end's, which says why to whoever has its secret
        said = unseal(SECRET, ANSWER.format(1), "", meeting.store.get(ANSWER.format(1)))
        assert "secret is another one" in said["refused"]


def test_what_a_worker_said_once_does_not_let_another_in() -> None:
    """A stranger who saw it puts it at a number of his own, or into the meeting of another day."""
    said = {"name": "stage-1", "nonce": "n"}
    with served() as meeting:
        for raw in (
            seal(SECRET, MEMBER.format(9), meeting.plan.nonce, said),
            seal(SECRET, MEMBER.format(2), "of yesterday", said),
        ):
            number = meeting.store.add(MEMBERS, 1)
            meeting.store.set(MEMBER.format(number), raw)
            assert meeting.joined(0.2) is None
            answer = unseal(SECRET, ANSWER.format(number), "", meeting.store.get(ANSWER.format(number)))
            assert "secret is another one" in answer["refused"]


def test_a_plan_of_another_front_end_is_followed_to_no_good() -> None:
    """Somebody serves an old plan, which he recorded: he cannot answer a worker that joins."""
    with served() as real:
        recorded = real.store.get(PLAN_KEY)
    with served() as false, asking() as pool:
        false._secret = OTHER
        false.store.set(PLAN_KEY, recorded.decode())
        asked = ask(pool, false)
        assert false.joined(0.5) is None
        with pytest.raises(RefusedError, match="is not the front end"):
            asked.result()


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b'{"text": 1, "hmac": 2}',
        b'{"text": "{}", "hmac": "\\ud800"}',
        b'{"text": "\\ud800", "hmac": ""}',
        b"[" * 50_000,
        b'{"text": "' + b"x" * MAX_MESSAGE + b'", "hmac": ""}',
    ],
)
def test_what_is_no_message_is_refused_before_it_is_believed(raw: bytes) -> None:
    with pytest.raises(InputError):
        unseal(SECRET, "place", "nonce", raw)


@pytest.mark.parametrize("text", ["[]", "1", "[" * 50_000, "{"])
def test_a_sealed_text_that_is_no_object_is_refused(text: str) -> None:
    raw = json.dumps({"text": text, "hmac": sealed._hmac(SECRET, "place", "nonce", text)}).encode()
    with pytest.raises(InputError, match="no shardprep made"):
        unseal(SECRET, "place", "nonce", raw)


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": "../../etc"},
        {"name": None},
        {"pp_rank": "1"},
        {"pp_rank": -1},
        {"layers": [1, 2, 3]},
        {"layers": ["0", "1"]},
        {"pid": 1.5},
        {"nbytes": 2**63},
        {"seconds": {"imports": "long"}},
        {"seconds": []},
        {"nonce": 3},
    ],
)
def test_a_member_that_says_nonsense_is_refused(wrong: dict[str, Any]) -> None:
    said = {
        "name": "stage-1", "pp_rank": 1, "layers": [3, 5], "host": "there", "pid": 7, "manifest_digest": DIGEST,
        "nbytes": 0, "bytes_fetched": 0, "seconds": {}, "nonce": "n", **wrong,
    }  # fmt: skip
    with served() as meeting:
        place = MEMBER.format(meeting.store.add(MEMBERS, 1))
        meeting.store.set(place, seal(SECRET, place, meeting.plan.nonce, said))
        assert meeting.joined(0.1) is None
        assert meeting.store.check([ANSWER.format(1)])


def test_a_number_that_is_taken_in_silence_holds_nobody_up() -> None:
    with served() as meeting, asking() as pool:
        for _ in range(10):
            meeting.store.add(MEMBERS, 1)
        asked = ask(pool, meeting)
        member = meeting.joined(20)
        assert member is not None
        assert member.number == 11
        meeting.welcome(member)
        assert asked.result().rank == 1


def test_a_counter_that_somebody_wrote_to_is_no_list_of_workers() -> None:
    with served() as meeting:
        meeting.store.add(MEMBERS, 10**12)
        with pytest.raises(WorkerError, match="somebody else writes to it"):
            meeting.joined(0)


def test_nobody_comes() -> None:
    with served() as meeting:
        assert meeting.joined(0) is None


def test_who_waits_at_a_meeting_that_was_closed_hears_of_it() -> None:
    """A signal may end a front end between its first thread and the first line that would end that thread."""
    meeting = open_meeting("127.0.0.1", plan=PLAN, secret=SECRET)
    meeting.close()
    with pytest.raises(WorkerError, match="was closed"):
        meeting.joined(1)


def test_a_worker_that_finds_no_front_end_says_so() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        with pytest.raises(
            WorkerError, match=rf"no front end answers at 127.0.0.1:{port} \(Connection refused\)"
        ):
            find_meeting(f"127.0.0.1:{port}", secret=SECRET, timeout=0.3)


def test_a_worker_may_come_before_its_front_end() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found: list[Invitation] = []
    waiting = threading.Thread(
        target=lambda: found.append(find_meeting(f"127.0.0.1:{port}", secret=SECRET, timeout=20))
    )
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    meeting = open_meeting("127.0.0.1", port, plan=PLAN, secret=SECRET)
    waiting.join(20)
    meeting.close()
    assert found[0].plan.stages == PLAN.stages


def test_a_front_end_that_is_about_to_end_is_not_joined() -> None:
    with served() as meeting:
        meeting.end()
        with pytest.raises(WorkerError, match="about to end"):
            find_meeting(meeting.address, secret=SECRET, timeout=0.3)


def test_a_worker_knows_an_end_from_a_loss() -> None:
    with served() as meeting, asking() as pool:
        asked = ask(pool, meeting)
        member = meeting.joined(20)
        assert member is not None
        meeting.welcome(member)
        found = asked.result()
        assert not found.is_over()
        meeting.end()
        assert found.is_over()
    assert not found.is_over()  # nobody is there to say so


# ------------------------------------------------------------------------------------------------ secrets, addresses
def test_a_store_listens_at_the_address_that_it_was_given_and_no_other() -> None:
    with served() as meeting, pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", meeting.port), timeout=5)


@pytest.mark.parametrize("host", ["8.8.8.8", "2001:4860:4860::8888"])
def test_a_public_address_is_refused_unless_it_is_asked_for(host: str) -> None:
    with pytest.raises(InputError, match=r"a public address.*--allow-public"):
        open_meeting(host, plan=PLAN, secret=SECRET)
    assert check_host(host, allow_public=True)[1] == host


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_all_addresses_at_once_may_be_public(host: str) -> None:
    with pytest.raises(InputError, match="all addresses of this machine"):
        open_meeting(host, plan=PLAN, secret=SECRET)


@pytest.mark.parametrize("host", ["127.0.0.1", "10.1.2.3", "192.168.0.1", "172.16.0.1", "fd00::1"])
def test_a_private_address_needs_no_leave(host: str) -> None:
    assert check_host(host, allow_public=False)[1] == host


def test_the_default_is_an_address_of_this_machine_that_is_not_public() -> None:
    found = default_host()
    assert not ipaddress.ip_address(found).is_global
    with socket.create_server((found, 0)):
        pass


def test_a_port_that_is_taken_is_named() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(InputError, match="Address already in use; use an address of this machine and a port"),
    ):
        open_meeting("127.0.0.1", taken.getsockname()[1], plan=PLAN, secret=SECRET)


def test_a_secret_that_can_be_guessed_is_refused() -> None:
    with pytest.raises(InputError, match="at least 16; set SHARDPREP_SECRET"):
        open_meeting("127.0.0.1", plan=PLAN, secret="short")
    assert new_secret() != new_secret()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("host:1", ("host", 1)), ("10.0.0.1:65535", ("10.0.0.1", 65535)), ("[fd00::1]:80", ("fd00::1", 80))],
)
def test_an_address(text: str, expected: tuple[str, int]) -> None:
    assert parse_address(text) == expected


@pytest.mark.parametrize(
    "text", ["", "host", "host:", ":80", "host:0", "host:65536", "fd00::1:80", "host:8o", "h:-1"]
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="write host:port"):
        parse_address(text)


def test_the_address_is_as_master_takes_it() -> None:
    with served() as meeting:
        assert parse_address(meeting.address) == ("127.0.0.1", meeting.port)
