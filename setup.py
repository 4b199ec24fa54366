"The package's metadata, read from settings.ini"
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup

here = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(here/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']

setup(
    name=cfg['name'], version=cfg['version'], description=cfg['description'], author=cfg['author'],
    license=cfg['license'], keywords=cfg['keywords'].split(), python_requires='>='+cfg['min_python'],
    long_description=(here/'README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    packages=['miniai'], include_package_data=True,
    install_requires=cfg['requirements'].split(),
    extras_require=dict(dev=cfg['dev_requirements'].split(), docs=cfg['docs_requirements'].split()),
    entry_points=dict(console_scripts=cfg['console_scripts'].split(), nbdev=['miniai=miniai._modidx:d']),
)
