"""Repositories over HTTP: only where it is allowed, a file's cost by its name, a tenant's own."""

from __future__ import annotations

import json

import pytest

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder that may be read, beside one that may not, with a link from the one to the other."""
    folder = tmp_path_factory.mktemp("trees")
    for name in ("allowed", "secret"):
        (folder / name / "tree").mkdir(parents=True)
        (folder / name / "tree" / "hello.py").write_text('def hello():\n    return "hello"\n')
    (folder / "allowed" / "way_out").symlink_to(folder / "secret")
    (folder / "allowed" / "way_in").symlink_to(folder / "allowed" / "tree")
    return folder / "allowed"


@pytest.fixture(scope="module")
def reader(serving, root):
    """A server that reads source trees, and one client for each of its tenants."""
    keys = ("--api-key", "alice=alice-key-1", "--api-key", "bob=bob-key-1")
    with serving(*keys, "--num-pages", "128", "--repository-root", str(root)) as server:
        server.wait_for("INFO ready:")
        with server.client() as alice, server.client("bob-key-1") as bob:
            yield alice, bob
        assert "Traceback" not in server.log, server.log


@pytest.fixture
def alice(reader):
    return reader[0]


def opened(client, path, **fields):
    response = client.post("/v1/repositories", json={"path": str(path), **fields})
    assert response.status_code == 200, response.text
    return response.json()


def ask(client, name, **fields):
    body = {"question": "What is said?", "max_tokens": 1, **fields}
    return client.post(f"/v1/repositories/{name}/ask", json=body)


def test_without_a_root_every_route_is_a_403_that_says_how_to_enable_it(http):
    responses = [
        http.post("/v1/repositories", json={"path": "/"}),
        http.get("/v1/repositories"),
        http.get("/v1/repositories/repo_1"),
        http.delete("/v1/repositories/repo_1"),
        http.post("/v1/repositories/repo_1/refresh"),
        ask(http, "repo_1"),
    ]
    assert {one.status_code for one in responses} == {403}
    assert all("--repository-root" in one.json()["error"]["message"] for one in responses)


@pytest.mark.parametrize("path", ["../secret/tree", "way_out/tree", "../allowed_not", "../nothing", "way_out", ".."])
def test_what_lies_outside_the_root_is_refused_whether_it_exists_or_not(alice, root, path):
    refused = alice.post("/v1/repositories", json={"path": f"{root}/{path}"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "outside_repository_root")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"path": "tree"}, "path"),
        ({"path": "/\0"}, "path"),
        ({"path": ""}, "path"),
        ({"path": "{root}/nothing"}, "path"),
        ({"path": "{root}/tree/hello.py"}, "path"),
        ({"path": "{root}/tree", "budget_tokens": 10**9}, "path"),
        ({"path": "{root}/tree", "budget_tokens": 0}, "budget_tokens"),
        ({"path": "{root}/tree", "tokens": 5}, "tokens"),
    ],
)
def test_a_tree_that_cannot_be_asked_about_is_a_400(alice, root, fields, param):
    body = {**fields, "path": fields["path"].replace("{root}", str(root))}
    response = alice.post("/v1/repositories", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_a_question_has_one_answer(alice, root):
    name = opened(alice, root / "tree")["id"]
    assert ask(alice, name, n=2).json()["error"]["param"] == "n"
    assert alice.delete(f"/v1/repositories/{name}").status_code == 200


def test_a_link_inside_the_root_is_followed(alice, root):
    tree = opened(alice, root / "way_in")
    assert [file["path"] for file in tree["files"]] == ["hello.py"]
    assert alice.delete(f"/v1/repositories/{tree['id']}").json()["deleted"]


def test_a_question_computes_the_files_once_and_after_an_edit_the_edited_one(alice, root):
    folder = root / "project"
    folder.mkdir()
    for name in ("one", "two"):
        (folder / f"{name}.py").write_text("".join(f"{name}_{n} = {n}\n" for n in range(12)))
    (folder / "picture.bin").write_bytes(b"\0" * 10)
    tree = opened(alice, folder, exclude=["*.md"])
    assert {file["path"] for file in tree["files"]} == {"one.py", "two.py"}
    assert tree["num_tokens"] == sum(file["num_tokens"] for file in tree["files"])
    assert [one["path"] for one in tree["skipped"]] == ["picture.bin"]

    first = ask(alice, tree["id"]).json()
    assert {cost["path"] for cost in first["computed"]} == {"one.py", "two.py"}
    assert ask(alice, tree["id"], question="What else?").json()["computed"] == []

    last = tree["files"][-1]["path"]
    (folder / last).write_text((folder / last).read_text() + "changed = True\n")
    refreshed = alice.post(f"/v1/repositories/{tree['id']}/refresh").json()
    assert refreshed["changed"] == [last]
    streamed = ask(alice, tree["id"], stream=True)
    data = [line[6:] for line in streamed.text.splitlines() if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    told = [json.loads(one) for one in data[:-1]]
    kinds = [one["object"] for one in told]
    assert (kinds[0], kinds[-1], set(kinds[1:-1]) <= {"repository.text"}) == (
        "repository.computed", "repository.answer", True,
    )  # fmt: skip
    assert [cost["path"] for cost in told[0]["computed"]] == [last]
    assert told[-1]["computed"] == told[0]["computed"]
    assert told[-1]["answer"] == "".join(one["text"] for one in told[1:-1])
    usage = told[-1]["usage"]
    assert (
        usage["prompt_tokens_details"]["cached_tokens"] + told[0]["computed"][0]["computed_tokens"] < usage["prompt_tokens"]
    )


def test_a_folder_that_became_a_link_to_the_outside_is_not_read_again(alice, root):
    folder = root / "replaced"
    folder.mkdir()
    (folder / "a.py").write_text("a = 1\n")
    name = opened(alice, folder)["id"]
    (folder / "a.py").unlink()
    folder.rmdir()
    gone = alice.post(f"/v1/repositories/{name}/refresh")
    assert (gone.status_code, gone.json()["error"]["param"]) == (400, "path")
    folder.symlink_to(root.parent / "secret" / "tree")
    assert alice.post(f"/v1/repositories/{name}/refresh").status_code == 403


def test_a_tree_of_another_tenant_is_not_there(reader, root):
    alice, bob = reader
    name = opened(alice, root / "tree")["id"]
    path = f"/v1/repositories/{name}"
    responses = [bob.get(path), bob.delete(path), bob.post(f"{path}/refresh"), ask(bob, name)]
    assert {one.status_code for one in responses} == {404}
    assert bob.get("/v1/repositories").json()["data"] == []
    listed = alice.get("/v1/repositories").json()["data"]
    assert name in [one["id"] for one in listed]
    assert alice.delete(path).status_code == 200
    assert alice.get(path).json()["error"]["code"] == "repository_not_found"
