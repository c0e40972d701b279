"""The whole program by HTTP, on slides of which one is damaged and one cannot be opened."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import numpy as np
import openslide
import orjson
import pytest
from PIL import Image
from starlette.testclient import TestClient

from medclip.app import viewer as viewer_module
from medclip.app.server import make_app
from tests.app.viewer_toys import AWKWARD, tiny_clip, toy_viewer, write_cohort


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cohort")
    write_cohort(path, tiny_clip())
    return path


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[TestClient]:
    viewer = toy_viewer(folder, tiny_clip(), captions=["tumour", "normal"])
    with TestClient(make_app(viewer), base_url="http://127.0.0.1") as made:
        viewer.wait()
        yield made


def one_line(answer: object) -> str:
    content = orjson.loads(answer.content)  # type: ignore[attr-defined]
    assert set(content) == {"error"} and "\n" not in content["error"]
    return content["error"]


def test_the_page_is_there_and_nothing_beside_it(client: TestClient) -> None:
    for path, start in (("/", "<!doctype html>"), ("/app.js", '"use strict"'), ("/openseadragon.txt", "Copyright")):
        assert client.get(path).text.startswith(start)
    for path in ("/app.py", "/static/app.js", "/docs", "/openapi.json", "/../pyproject.toml", "/..%2fpyproject.toml"):
        assert client.get(path).status_code == 404


def test_slides_are_listed_and_a_broken_one_is_a_line(client: TestClient, folder: Path) -> None:
    found = client.get("/api/slides").json()
    rows = {row["name"]: row for row in found["slides"]}
    assert found["waiting"] == 0 and set(rows) == {"one", AWKWARD, "damaged", "half"}
    assert (rows["one"]["width"], rows["one"]["height"], rows["one"]["mpp"]) == (1000, 800, 0.25)
    assert rows["one"]["patches"] == 80 and rows["damaged"]["patches"] is None
    assert rows["half"]["error"] and "width" not in rows["half"]
    assert str(folder) not in str(found)
    assert str(folder) not in one_line(client.get("/api/slides/half"))
    assert client.get("/api/slides/half/thumbnail.jpg").status_code == 422
    assert client.get("/api/slides/one/thumbnail.jpg").status_code == 200


@pytest.mark.parametrize("name", ["..%2Fslides%2Fone", "%2e%2e%2Fone", "%2Fetc%2Fpasswd", "one.svs", "one%00", "none"])
def test_names_that_are_none(client: TestClient, name: str) -> None:
    for rest in ("", "/thumbnail.jpg", "/tiles/10/0_0.jpg", "/map?model=tiny&prompt=x", "/near?model=tiny&x=1&y=1"):
        answer = client.get(f"/api/slides/{name}{rest}")
        assert answer.status_code in (404, 422) and "image" not in answer.headers["content-type"]


def test_nothing_but_the_slides_and_features_is_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    viewer = toy_viewer(folder, tiny_clip())
    asked: list[str] = []
    inner = viewer.pool.use
    monkeypatch.setattr(viewer.pool, "use", lambda name: (asked.append(name), inner(name))[1])
    with TestClient(make_app(viewer), base_url="http://127.0.0.1") as client:
        viewer.wait()
        asked.clear()
        for name in ("..%2F..%2Fetc%2Fpasswd", "etc", quote(str(folder / "slides" / "one.svs"), safe="")):
            client.get(f"/api/slides/{name}/tiles/9/0_0.jpg")
        assert not asked
        client.get("/api/slides/one/tiles/9/0_0.jpg")
        assert asked == ["one"]


def test_an_awkward_name_is_a_name(client: TestClient) -> None:
    answer = client.get(f"/api/slides/{quote(AWKWARD)}/map", params={"model": "tiny", "prompt": "tumour"})
    assert (answer.json()["top"][0]["x"], answer.json()["top"][0]["y"]) == (700, 0)
    file = client.get(
        f"/api/slides/{quote(AWKWARD)}/download", params={"model": "tiny", "prompt": "a/../b\r\n", "kind": "csv"}
    )
    said = file.headers["content-disposition"]
    assert file.status_code == 200 and "/" not in said.partition("''")[2] and "\n" not in said


def test_tiles(client: TestClient) -> None:
    row = client.get("/api/slides/one").json()
    first = client.get(f"/api/slides/one/tiles/{row['first']}/0_0.jpg")
    assert first.headers["content-type"] == "image/jpeg" and "private" in first.headers["cache-control"]
    assert Image.open(io.BytesIO(first.content)).size == (250, 200)
    assert client.get(f"/api/slides/one/tiles/{row['first']}/0_0.jpg").content == first.content  # from memory
    for place in (f"{row['last'] + 1}/0_0", f"{row['last']}/4_0", f"{row['first'] - 1}/0_0", f"{10**30}/0_0"):
        assert client.get(f"/api/slides/one/tiles/{place}.jpg").status_code == 404
    for place in ("-1/0_0", "9/-1_0", "9/a_b", "9/0_0.png"):
        assert client.get(f"/api/slides/one/tiles/{place}.jpg").status_code in (404, 422)
    damaged = client.get(f"/api/slides/damaged/tiles/{row['last']}/1_1.jpg")
    assert damaged.status_code == 200 and damaged.headers["x-broken"] == "1"
    assert client.get("/api/slides/damaged").json()["broken"] == 1


def test_a_text_finds_its_patch(client: TestClient) -> None:
    found = client.get("/api/slides/one/map", params={"model": "tiny", "prompt": " tumour "}).json()
    top = found["top"]
    assert (top[0]["x"], top[0]["y"], top[0]["side"]) == (200, 400, 100.0)
    assert top[0]["score"] == pytest.approx(1, abs=1e-3) and len(top) == 5
    assert found["greatest"] == pytest.approx(1, abs=1e-3) and found["patches"] == 80
    png = client.get("/api/slides/one/map.png", params={"model": "tiny", "prompt": "tumour"})
    picture = np.asarray(Image.open(io.BytesIO(png.content)))
    scale = picture.shape[1] / 1000
    yellow = picture[int(450 * scale), int(250 * scale)]
    assert tuple(yellow) == (253, 231, 37, 255)  # viridis' end: it is the greatest
    against = {"model": "tiny", "prompt": "tumour", "against": "tumour"}
    none = client.get("/api/slides/one/map", params=against).json()
    assert none["least"] == none["greatest"] == 0  # a text minus itself


def test_what_a_map_is_refused_for(client: TestClient) -> None:
    for slide, words, why in (
        ("one", {"model": "tiny"}, "give a text"),
        ("one", {"model": "tiny", "prompt": "x" * 301}, "300 characters"),
        ("one", {"model": "other", "prompt": "x"}, "no such model"),
        ("damaged", {"model": "tiny", "prompt": "x"}, "no features"),
        ("one", {"prompt": "x"}, "model"),
        ("one", {"model": "tiny", "prompt": "x", "kind": "exe"}, "no such file"),
    ):
        answer = client.get(f"/api/slides/{slide}/{'download' if 'kind' in words else 'map'}", params=words)
        assert answer.status_code in (404, 422) and why in one_line(answer), words


def test_a_patch_s_neighbours(client: TestClient) -> None:
    found = client.get("/api/slides/one/near", params={"model": "tiny", "x": 299, "y": 400}).json()
    assert (found["patch"]["x"], found["patch"]["y"]) == (200, 400)
    assert found["captions"][0][0] == "tumour" and found["captions"][0][1] == pytest.approx(1, abs=2e-3)
    # The other slide's "tumour" is the nearest of the cohort.
    assert (found["cohort"][0]["slide"], found["cohort"][0]["x"]) == (AWKWARD, 700)
    assert found["searched"] == found["of"] == 2
    assert all((hit["x"], hit["y"]) != (200, 400) for hit in found["here"])
    assert client.get("/api/slides/one/near", params={"model": "tiny", "x": -5, "y": 5}).status_code == 404
    hit = found["cohort"][0]
    place = {"x": hit["x"], "y": hit["y"], "side": 100}
    picture = client.get(f"/api/slides/{quote(AWKWARD)}/patch.jpg", params=place)
    assert Image.open(io.BytesIO(picture.content)).size == (160, 160)
    for bad in ({"x": 1000, "y": 0, "side": 100}, {"x": 0, "y": 0, "side": 0}, {"x": 0, "y": 0, "side": 10**6}):
        assert client.get("/api/slides/one/patch.jpg", params=bad).status_code == 422
    assert client.get("/api/slides/one/patch.jpg", params={"x": "a", "y": 0, "side": 9}).status_code == 422


def test_files_open_where_they_should(client: TestClient, tmp_path: Path) -> None:
    words = {"model": "tiny", "prompt": "tumour"}
    files = {kind: client.get("/api/slides/one/download", params=words | {"kind": kind}) for kind in
             ("png", "geojson", "tiff", "csv")}  # fmt: skip
    assert all(answer.headers["content-disposition"].startswith("attachment") for answer in files.values())
    assert Image.open(io.BytesIO(files["png"].content)).size[0] >= 1000
    collection = orjson.loads(files["geojson"].content)
    best = max(collection["features"], key=lambda one: max(one["properties"]["measurements"].values()))
    assert best["geometry"]["coordinates"][0][0] == [200, 400] and len(collection["features"]) == 80
    (tmp_path / "a.tiff").write_bytes(files["tiff"].content)
    with openslide.OpenSlide(tmp_path / "a.tiff") as opened:
        down = 1000 / opened.dimensions[0]
        assert down == pytest.approx(800 / opened.dimensions[1], rel=0.02)
        assert opened.read_region((int(250 / down), int(450 / down)), 0, (1, 1)).getpixel((0, 0))[:3] == (253, 231, 37)
    rows = files["csv"].text.splitlines()
    assert len(rows) == 81 and max(rows[1:], key=lambda row: float(row.split(",")[-1])).split(",")[1:3] == [
        "200",
        "400",
    ]


def test_many_more_than_the_queue_are_told_to_come_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    viewer = toy_viewer(folder, tiny_clip(), renders=1, waiting=1)
    app = make_app(viewer)
    import asyncio
    import threading

    import httpx

    free = threading.Event()
    draw = viewer_module.tiles.tile
    monkeypatch.setattr(viewer_module.tiles, "tile", lambda *given: (free.wait(20), draw(*given))[1])

    async def go() -> list[int]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            places = [f"/api/slides/one/tiles/10/{column}_{row}.jpg" for column in range(4) for row in (0, 1)]
            asked = [asyncio.create_task(client.get(place)) for place in places]
            done, _ = await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
            early = [one.result().status_code for one in done]
            free.set()
            answers = await asyncio.gather(*asked)
            assert all(one.headers.get("retry-after") == "1" for one in answers if one.status_code == 503)
            again = await client.get(places[-1])
            return [*early, again.status_code, *sorted(one.status_code for one in answers)]

    found = asyncio.run(go())
    viewer.close()
    assert found[0] == 503 and found[-8:] == [200] * 2 + [503] * 6 and 200 in found[:-8]


def test_an_error_of_ours_is_a_line_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    viewer = toy_viewer(folder, tiny_clip())
    monkeypatch.setattr(viewer, "near", lambda *given: 1 / 0)
    with TestClient(make_app(viewer), base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        answer = client.get("/api/slides/one/near", params={"model": "tiny", "x": 1, "y": 1})
        assert answer.status_code == 500 and "division" not in one_line(answer)
        assert client.get("/api/slides").status_code == 200
