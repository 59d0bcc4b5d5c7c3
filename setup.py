"Reads settings.ini. The name, the description and the addresses are in pyproject.toml."
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
ini = ConfigParser(interpolation=None)
ini.read(here/'settings.ini', encoding='utf-8')
package = ini['package']


def lines(text):
    "The non-empty lines of a setting."
    return [line.strip() for line in text.strip().splitlines()]


def readme():
    "README.md with absolute links, as PyPI needs them."
    home = re.search(r'^Repository = "(.*)"$', (here/'pyproject.toml').read_text(encoding='utf-8'), re.M).group(1)
    text = (here/'README.md').read_text(encoding='utf-8')
    text = re.sub(r'(!\[[^]]*\])\((?!\w+:)', rf'\1({home}/raw/main/', text)
    return re.sub(r'\]\((?!\w+:|#)', f']({home}/blob/main/', text)


setup(
    version=package['version'],
    python_requires=package['python'],
    author=package['author'],
    license=package['license'],
    keywords=package['keywords'],
    classifiers=lines(package['classifiers']),
    long_description=readme(),
    long_description_content_type='text/markdown',
    install_requires=lines(package['requirements']),
    extras_require={name: lines(text) for name, text in ini['extras'].items()},
    packages=find_packages(include=['wsss_nb', 'wsss_nb.*']),
    entry_points={
        'console_scripts': [f'{name} = {target}' for name, target in ini['commands'].items()],
        'nbdev': ['wsss_nb = wsss_nb._modidx:d'],
    },
)
