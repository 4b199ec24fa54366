"The package's metadata, read from settings.ini"
import re, sys
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup

here = Path(__file__).parent
config = ConfigParser(delimiters=['='])
config.read(here/'settings.ini', encoding='utf-8')
cfg = config['DEFAULT']

def absolute(m): return f"{m[1]}({cfg['git_url']}/{'raw' if m[1][0] == '!' else 'blob'}/{cfg['branch']}/{m[2]})"

# the README is read outside the repository, too: there its links and pictures need the whole address
readme = re.sub(r'(!?\[[^\]]*\])\((?!https?:|#)([^)]+)\)', absolute, (here/'README.md').read_text(encoding='utf-8'))
# nbdev's commands in the course's spelling are for who works on the notebooks, in an editable install; a wheel goes without
dev_scripts = cfg['dev_console_scripts'].split() if 'editable_wheel' in sys.argv else []

setup(
    name=cfg['name'], version=cfg['version'], description=cfg['description'], author=cfg['author'],
    license=cfg['license'], keywords=cfg['keywords'].split(), python_requires='>='+cfg['min_python'],
    url=cfg['git_url'], project_urls=dict(o.split('=', 1) for o in cfg['project_urls'].split()),
    long_description=readme, long_description_content_type='text/markdown',
    packages=['miniai'], package_data=dict(miniai=['py.typed', 'weights/**']), include_package_data=False,
    install_requires=cfg['requirements'].split(),
    extras_require=dict(dev=cfg['dev_requirements'].split(), docs=cfg['docs_requirements'].split()),
    entry_points=dict(console_scripts=cfg['console_scripts'].split()+dev_scripts, nbdev=['miniai=miniai._modidx:d']),
)
