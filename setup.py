"""Packaging. Every value comes from settings.ini, which nbdev reads too."""

import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
PYTHONS = [f"3.{minor}" for minor in range(11, 13)]  # which CI runs
STATUSES = {"1": "1 - Planning", "2": "2 - Pre-Alpha", "3": "3 - Alpha", "4": "4 - Beta", "5": "5 - Production/Stable"}

parser = ConfigParser(delimiters=["="])
parser.read(HERE / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]


def names(key: str) -> list[str]:
    "The requirements listed under `key`; a space ends one, so none may contain a space."
    return cfg.get(key, "").split()


def readme() -> str:
    "README.md with its relative links and pictures made absolute, as an index shows it away from the repository."
    path = HERE / "README.md"
    if not path.exists():
        return cfg["description"]
    parts = re.split(r"(^```.*?^```$)", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    link = re.compile(r"(!?)(\[[^\]]*\])\((?![a-z]+:|#|/)([^)\s]+)\)")

    def absolute(found: "re.Match[str]") -> str:
        kind = "raw" if found[1] else "blob"
        return f"{found[1]}{found[2]}({cfg['git_url']}/{kind}/{cfg['branch']}/{found[3]})"

    parts[::2] = [link.sub(absolute, part) for part in parts[::2]]  # between the fenced blocks
    return "".join(parts)


tools = names("nbdev_requirements")
extras = {
    "flash-attn": names("flash_attn_requirements"),
    "transformers": names("transformers_requirements"),
    "triton": names("triton_requirements"),
    "docs": tools + names("docs_requirements"),
    "dev": tools + names("docs_requirements") + names("dev_requirements"),
}
oldest = tuple(int(part) for part in cfg["min_python"].split("."))

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme(),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    url=cfg["git_url"],
    license=cfg["license"].upper(),
    license_files=["LICENSE"],
    keywords=cfg["keywords"],
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=[cfg["lib_path"], f"{cfg['lib_path']}.*"]),
    package_data={cfg["lib_path"]: ["py.typed"]},
    install_requires=names("requirements"),
    extras_require=extras,
    entry_points={"nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"]},
    classifiers=[
        f"Development Status :: {STATUSES[cfg['status']]}",
        f"Intended Audience :: {cfg['audience']}",
        f"Natural Language :: {cfg['language']}",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: {v}" for v in PYTHONS if tuple(map(int, v.split("."))) >= oldest),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    zip_safe=False,
)
