"""`fate profile`: measured once, kept, and measured again only where it must be or is asked for."""

from __future__ import annotations

import re
from pathlib import Path

from cli_support import FAMILY, Cli, copied
from fate.plan.profile import LayerProfile, Machine, Profile, read_profile, write_profile
from fate.store.reader import StoreReader
from tiny import tiny_store


def test_it_is_measured_once(cli: Cli, tmp_path: Path) -> None:
    store = copied(tiny_store(FAMILY), tmp_path / "tiny.fate")
    result = cli("profile", store, "--json")
    assert result.code == 0, result.err
    assert result.err == ""
    assert result.json["measured"]
    assert result.json["path"] == str(store / "profile.json")
    assert re.search(rf"; stored in {store}/profile\.json$", result.out, re.M)
    header, *rows = result.out.splitlines()[:4]
    columns = ("layers", "1 token", "16 tokens", "64 tokens", "256 tokens", "FULL", "INT2", "rho", "recall")
    assert tuple(re.split(r" {2,}", header)) == columns
    assert {row.split()[0] for row in rows} <= {"0", "1", "2", "0-1", "1-2", "0-2"}

    kept = (store / "profile.json").read_bytes()
    again = cli("profile", store, "--json")
    assert (store / "profile.json").read_bytes() == kept
    assert again.json == {**result.json, "measured": False}
    assert f"; up to date: {store / 'profile.json'}" in again.out
    forced = cli("profile", store, "--force", "--json")
    assert (forced.err, forced.json["measured"]) == ("", True)
    assert (store / "profile.json").read_bytes() != kept


def test_a_profile_of_another_machine_is_measured_again(cli: Cli, tmp_path: Path) -> None:
    store = copied(tiny_store(FAMILY), tmp_path / "tiny.fate")
    reader = StoreReader(store)
    reader.close()
    layer = LayerProfile((1.0,), 1.0, 4096, None, None, None, (1.0,))
    write_profile(Profile(reader.header.fingerprint, Machine("6502", 1, "none", "0"), (1,), 1.0, (layer,)), store)
    text = tmp_path / "story.txt"
    text.write_text("Once upon a time there was a machine. " * 8)
    result = cli("profile", store, "--text", text, "--experts", "50%", "--json")
    reason = "it is of another machine \\(6502, 1 threads, none kernels, file system 0\\)"
    assert re.fullmatch(
        rf"the profile in {store}/profile\.json is not used, {reason}: measuring again\n", result.err
    ), result.err
    assert result.json["measured"]
    assert read_profile(store, reader.header).profile is not None
