"""Multi30k: descriptions of photographs in English, and their translations to German.

Elliott et al. 2016, "Multi30K: Multilingual English-German Image Descriptions" (arXiv 1605.00459); the
raw text of task 1 from https://github.com/multi30k/dataset, with the test set of 2016.
"""

import hashlib
from pathlib import Path

from jaxnets import errors
from jaxnets.data.datasets import check_digests, check_verify
from jaxnets.data.download import download
from jaxnets.data.lines import read_content
from jaxnets.data.parallel import ParallelCorpus, find, read_pairs
from jaxnets.data.progress import Progress

_URL = "https://raw.githubusercontent.com/multi30k/dataset/master/data/task1/raw"
_FILES = {"train": "train", "val": "val", "test": "test_2016_flickr"}
_COUNTS = {"train": 29_000, "val": 1_014, "test": 1_000}
_OFFICIAL = {  # bytes and SHA-256 of what is downloaded, and the SHA-256 of the text in it
    "train.de.gz": (
        637_044,
        "726e39b2fa9eb9ffb6dc763fb35a179f80fae06ffc5d28b6ace5faa883de28a6",
        "2c2b73fd2b548fbcde3a875e0a78d6ee94d498bfdee6bd3eae3945779e9ddf72",
    ),
    "train.en.gz": (
        568_929,
        "d79cfa999dd4c51d2cb42499b6796d5a882c3a8a961923c25a898c90f8bbd56f",
        "460a15fbd157e34a7a9957ee388c1ca247fe47af3ef25fb50442af6c274e0fc6",
    ),
    "val.de.gz": (
        24_681,
        "f0cba2f995189cf5770f29a8a9a537a3ad3f51657ad873405082ff6863a5e75a",
        "660e09eb7e1da2f856ea13ee5ad3cf6d36b3d5b0b733c857e94c5747a3dfc660",
    ),
    "val.en.gz": (
        21_650,
        "14f7d25ddd868909a9213e361768460edcacdd6ab9d1e77b92560dc10c10dc28",
        "1f2a23d992769b5b3d209b0a10dd0b77c08cceb1f20dfb97ed0aafa49d107227",
    ),
    "test_2016_flickr.de.gz": (
        22_890,
        "9204244e408ccb38d2a55cfcd344df15005fc42a07a6e55ca6c52b6ababb8cc8",
        "4be6b5b3236b79c25475c6bb829800a7ce559e9ba7a1f6c2394fe4d40be46d16",
    ),
    "test_2016_flickr.en.gz": (
        21_077,
        "611d361c6334bc7246101d48097c13cf5c4413c5befc793cc629934359d532d9",
        "399a4382932c1aadd3ceb9bef1008d388a64c76d4ae4e9d4728c6f4301cac182",
    ),
}
_LANGUAGES = ("de", "en")


def load_multi30k(
    *,
    source: str = "de",
    target: str = "en",
    data_dir: Path,
    verify: str = "warn",
    progress: Progress = True,
) -> ParallelCorpus:
    """Multi30k: 29,000 pairs to learn from, 1,014 to choose by, and the 1,000 of test 2016.

    Args:
        source: "de" or "en".
        target: the other.
        data_dir: the files are in `data_dir/multi30k`; those that are absent are downloaded (1.3 MB
            in all).
        verify: "warn" or "strict", for files that aren't the official ones.
        progress: see `jaxnets.data.load`.

    Raises:
        ConfigError: for another language.
        DataError: if a file can't be downloaded, or is damaged.
    """
    check_verify(verify)
    for language in (source, target):
        if language not in _LANGUAGES:
            raise errors.unknown("language of multi30k", language, _LANGUAGES)
    folder = Path(data_dir) / "multi30k"
    parts, digests = {}, {}
    for part, stem in _FILES.items():
        paths = []
        for language in (source, target):
            name = f"{stem}.{language}.gz"
            if not any((folder / n).is_file() for n in (name, name.removesuffix(".gz"))):
                size, sha256, _ = _OFFICIAL[name]
                download(f"{_URL}/{name}", folder / name, size=size, sha256=sha256, progress=progress)
            path = find(folder, f"{stem}.{language}")
            digests[name] = hashlib.sha256(read_content(path)).hexdigest()
            paths.append(path)
        parts[part] = read_pairs(*paths)
        if len(parts[part]) != _COUNTS[part]:
            raise errors.DataError(
                f"{paths[0]}: has {len(parts[part]):,} lines, expected {_COUNTS[part]:,}: remove the "
                "files and they are downloaded again"
            )
    official = {name: sha256 for name, (_, _, sha256) in _OFFICIAL.items()}
    mend = "remove the files to download them"
    where = check_digests("multi30k", str(folder), digests, official, verify=verify, mend=mend)
    return ParallelCorpus("multi30k", parts, where)
