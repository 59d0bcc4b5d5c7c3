"Sphinx settings; docs/build.py calls Sphinx. Name, addresses and description come from pyproject.toml."
from docutils.nodes import SkipNode
from latex2mathml.converter import convert
from nbdev.config import get_config

import wsss_nb

cfg = get_config(__file__)
project, author = cfg.lib_name, cfg.lib_name + ' contributors'
version = release = wsss_nb.__version__
copyright = author
html_title = project

extensions = ['myst_nb']
nb_execution_mode = 'off'
nb_output_stderr = 'remove'
nb_merge_streams = True
myst_enable_extensions = ['dollarmath', 'amsmath', 'attrs_inline', 'attrs_block', 'deflist']
myst_heading_anchors = 4
suppress_warnings = ['myst.header', 'mystnb.unknown_mime_type', 'misc.highlighting_failure']

html_theme = 'furo'
html_static_path = ['static']
html_css_files = ['site.css']
html_favicon = 'static/logo.svg'
html_copy_source = html_show_sourcelink = False
html_theme_options = {
    'light_logo': 'logo.svg', 'dark_logo': 'logo.svg', 'sidebar_hide_name': False,
    'light_css_variables': {'color-brand-primary': '#0b6e75', 'color-brand-content': '#0b6e75'},
    'dark_css_variables': {'color-brand-primary': '#5cc5cc', 'color-brand-content': '#5cc5cc'},
    'footer_icons': [{'name': 'GitHub', 'url': cfg.git_url, 'html': 'GitHub', 'class': 'footer-link'}],
}


# Formulas as MathML: every browser draws it, nothing is loaded from elsewhere.

def formula(display):
    "Renderer of inline formulas or of blocks."
    def visit(self, node):
        self.body.append(convert(node.astext(), display=display))
        raise SkipNode
    return visit, None


def setup(app): app.add_html_math_renderer('mathml', formula('inline'), formula('block'))


html_math_renderer = 'mathml'
