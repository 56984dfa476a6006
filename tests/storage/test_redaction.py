"""Secrets do not survive in what is written or shown; ordinary text does, letter for letter."""

from __future__ import annotations

import json
import os
import re
import sys
import traceback
from unittest import mock
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from leap_dist.config.loading import fields, resolve
from leap_dist.driver.actors import ServerProcess, WorkerActor
from leap_dist.driver.clients import AggregatorActor
from leap_dist.driver.mps import DaemonActor
from leap_dist.driver.resource_requests import RequestActor
from leap_dist.envs.games import available
from leap_dist.storage import auth_token, manifest
from leap_dist.storage.redaction import RedactedStream, print_exception, redact, redact_all, redact_output

VARIABLES = ["RAY_AUTH_TOKEN", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "MY_SECRET", "wandb_api_key"]
AROUND = st.text(st.characters(exclude_categories=("C",)), max_size=30)
ANY_SECRET = st.text(st.characters(exclude_categories=("C",), exclude_characters="*"), min_size=8, max_size=60)
WORD = st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="\"'"), min_size=8, max_size=40)


@given(st.sampled_from(VARIABLES), ANY_SECRET, AROUND, AROUND)
def test_what_a_variable_of_the_environment_holds_is_hidden_wherever_it_stands(name, secret, before, after):
    forms = {secret, json.dumps([secret])[2:-2], repr(secret)[1:-1]}
    assume(not any(form in before or form in after for form in forms))
    with mock.patch.dict(os.environ, {name: secret}):
        for form in forms:
            assert form not in redact(f"{before}{form}{after}")


@pytest.mark.parametrize("named", [False, True])
def test_the_token_in_a_file_is_hidden(monkeypatch, tmp_path, named):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    path = tmp_path / "mine" if named else auth_token.default_path()
    path.parent.mkdir(exist_ok=True)
    path.write_text("0123abcd4567\n")
    if named:
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    assert redact("x0123abcd4567y") == "x***y"


NAMED = [
    "token={}", "--token {}", "--hf-token={}", "password: {}", "'password': '{}'", '"api_key": "{}"', "secret = {}",
    "AWS_SECRET_ACCESS_KEY={}", "HF_TOKEN={}", "SIGNING_KEY={}", "Authorization: Bearer {}", "authorization: {}",
    "bearer {}", "client_secret={}", "?access_token={}", "passwd={}", "Authorization: Basic {}",
]  # fmt: skip


@given(st.sampled_from(NAMED), WORD, st.sampled_from(["", "at w0 ", "a: b, "]), st.sampled_from(["", " and more"]))
@example("token={}", "a,b;c&d=e", "", "")
@example("authorization: {}", "00000000", "", " and more")
def test_what_follows_a_name_that_says_secret_is_hidden(shape, secret, before, after):
    assume(not secret.endswith("\\"))  # in quotes it would be no end
    hidden = redact(before + shape.format(secret) + after)
    assert hidden.count(secret) == 0
    # A word after "authorization:" may be a scheme, such as Basic; the secret is what follows it, and is hidden too.
    is_scheme = shape == "authorization: {}" and re.fullmatch(r"\w+", secret)
    assert hidden.endswith(after.removeprefix(" and") if is_scheme else after)


@given(
    st.sampled_from(["https://{}@host/x", "redis://me:{}@h:1", "at me:{}@10.0.0.1:6379", "ssh://{}@[::1]:22"]),
    st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="/*"), min_size=8, max_size=40),
)
@example("https://{}@host/x", "user:abc+def=%2F")
def test_user_and_password_of_an_address_are_hidden(shape, secret):
    assert secret not in redact(shape.format(secret))


AWS_SECRET = st.text("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789/+", min_size=40, max_size=40)
OF_AMAZON = [
    "s3://AKIAIOSFODNN7EXAMPLE:{}@bucket/x", "cannot open 's3://AKIAIOSFODNN7EXAMPLE:{}@bucket/x'",
    "https://me:{}@host:9000/x?a=b", "AKIAIOSFODNN7EXAMPLE:{}", "AKIAIOSFODNN7EXAMPLE, {}", "AWS_SECRET_ACCESS_KEY={}",
    "aws_secret_access_key = {}", '{{"SecretAccessKey": "{}"}}', "?X-Amz-Signature={}&x=1",
    "&AWSAccessKeyId=A&Signature={}",
    "X-Amz-Security-Token={}", "SecretAccessKey='{}'",
    'Traceback (most recent call last):\n  File "x.py", line 3\n'
    '    key="AKIAIOSFODNN7EXAMPLE", secret="{}"\nValueError',
]  # fmt: skip


@given(st.sampled_from(OF_AMAZON), AWS_SECRET)
@example("s3://AKIAIOSFODNN7EXAMPLE:{}@bucket/x", "abc/def+ghi")
@example("s3://AKIAIOSFODNN7EXAMPLE:{}@bucket/x", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY")
def test_a_secret_of_amazon_is_hidden_with_every_character_that_it_may_have(shape, secret):
    text = redact(shape.format(secret))
    for part in (part for part in secret.replace("+", "/").split("/") if len(part) > 3):
        assert part not in text


def quote_in_lower_case(text: str) -> str:
    return quote(text, safe="").replace("%2F", "%2f").replace("%2B", "%2b")


@given(AWS_SECRET, st.sampled_from([quote, quote_plus, quote_in_lower_case]))
def test_a_secret_of_the_environment_is_hidden_in_urls(secret, quoted):
    with mock.patch.dict(os.environ, {"AWS_SECRET_ACCESS_KEY": secret}):
        assert quoted(secret) not in redact(f"GET https://host/x?k={quoted(secret)}&y=1")


def test_a_secret_that_stands_alone_is_hidden_and_hashes_are_not():
    assert redact("it is wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEK3Y") == "it is ***"
    sha1 = "356a192b7913b04c54574d18c28d46e6395428ab"
    assert redact(f"revision {sha1}") == f"revision {sha1}"


def test_a_traceback_that_nobody_expected_shows_no_secret(capsys, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "abc/def+ghi/jkl")
    try:
        raise ValueError("cannot open s3://AKIAIOSFODNN7EXAMPLE:abc/def+ghi/jkl@bucket/x with 'abc/def+ghi/jkl'")
    except ValueError as error:
        print_exception(type(error), error, error.__traceback__)
    text = capsys.readouterr().err
    assert "Traceback (most recent call last)" in text
    assert "abc/def" not in text


def test_key_ids_of_amazon_are_hidden():
    assert redact("with AKIAIOSFODNN7EXAMPLE and ASIAIOSFODNN7EXAMPLE.") == "with *** and ***."


ORDINARY = [
    "tokens/s 1,234", "keep_checkpoints: 3", "server.keep_checkpoints: 0 is too small; the smallest valid value is 1",
    "w0 died and is restarted in 2 s: The actor died unexpectedly", "lease 3-ab12cd of w0 (pong) expired",
    "runs/quick-20260101-120000/init.safetensors", "https://arxiv.org/abs/1812.01054", "me@example.org: 12:30",
    "git@github.com:someone/something.git", "1e-4 0.99 -inf nan", "monkey: banana", "key: value", "passwords",
    "address: the cluster at '10.0.0.1:6379' asks for a token, and there is none here; set RAY_AUTH_TOKEN_PATH",
    "address: no Ray cluster answers at 'head:6379' (unavailable); start one, or use local", "key=a, b",
    "launch.py train --preset quick --games pong,assault --agent.learning-rate 1e-4 --run-dir /a/b",
]  # fmt: skip


@pytest.mark.parametrize("text", [*ORDINARY, *available(), *(name for name, _, _ in fields())])
def test_ordinary_text_is_left_alone(monkeypatch, text):
    for name in list(os.environ):
        if name.upper().endswith(("TOKEN", "KEY", "SECRET", "PASSWORD")):
            monkeypatch.delenv(name)
    assert redact(text) == text


@given(st.lists(st.sampled_from([*ORDINARY, *available()])))
def test_several_texts_are_several_texts(texts):
    assert redact_all(texts) == texts


@pytest.mark.timeout(30)
@pytest.mark.parametrize("part", ["a.", "-", "a:,", "http", 'token="', "A_", "://", "bearer ", "--token", "a:b", "'"])
def test_long_texts_take_no_time(part):
    redact(part * 50_000)


def test_short_values_are_not_hidden_for_they_are_everywhere(monkeypatch):
    monkeypatch.setenv("SORT_KEY", "pong")
    assert redact("pong") == "pong"


def test_the_manifest_holds_no_secret_of_the_command_line(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    arguments = ["/x/launch.py", "train", "--run-dir", "s3://me:hunter22@store/x", "--config", "hf_0123456789.yaml"]
    monkeypatch.setattr(manifest.sys, "argv", arguments)
    command = manifest.describe(resolve("smoke"))["command"]
    assert command == ["launch.py", "train", "--run-dir", "s3://***@store/x", "--config", "***.yaml"]


def test_what_an_actor_prints_holds_no_secret(monkeypatch, capsys):
    """Ray keeps it in files. A line counts as a whole, in however many pieces it is written."""
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # so that they are put back
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    redact_output()
    redact_output()  # of two actors in one process
    print("the token is hf_01234", end="")
    print("56789, and that was it")
    print("no line break: hf_0123456789", end="", flush=True)
    try:
        raise ValueError("hf_0123456789")
    except ValueError:
        traceback.print_exc()
        print("failed with hf_0123456789", file=sys.stderr)
    sys.stderr.flush()
    out, err = capsys.readouterr()
    assert out == "the token is ***, and that was it\nno line break: ***"
    assert "hf_0123456789" not in err
    assert "failed with ***" in err
    assert not isinstance(sys.stdout._stream, RedactedStream)


@pytest.mark.parametrize(
    ("start", "module"),
    [
        (ServerProcess, "actors"),
        (lambda: WorkerActor("w0", "i0", resolve("smoke"), False), "actors"),
        (lambda: AggregatorActor(None, 1.0), "clients"),
        (RequestActor, "resource_requests"),
        (DaemonActor, "mps"),
    ],
    ids=["server", "worker", "aggregator", "requests", "mps"],
)
def test_every_actor_hides_secrets_in_what_it_prints(monkeypatch, start, module):
    """From its first line on, since what comes after may already print something."""

    class Hidden(Exception):
        pass

    def hide() -> None:
        raise Hidden

    monkeypatch.setattr(f"leap_dist.driver.{module}.redact_output", hide)
    with pytest.raises(Hidden):
        start()
