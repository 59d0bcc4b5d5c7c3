"Tables survive writing and reading, and say what they know."
import json, math
from pathlib import Path
import numpy as np, pandas as pd, pytest
from hypothesis import given, settings, strategies as st
from wsss_nb.data.items import InputError
from wsss_nb.evaluate.metrics import Interval
from wsss_nb.study.tables import Published, Table, format_cell

numbers = st.floats(0, 1) | st.just(math.nan)
cells = st.one_of(st.none(), st.text(max_size=8), st.integers(-9, 9), numbers, st.booleans(),
                  st.builds(Interval, numbers, numbers, numbers), st.builds(Published, numbers, st.text(min_size=1, max_size=9)))

@given(st.integers(1, 4).flatmap(lambda n: st.lists(st.lists(cells, min_size=n, max_size=n), min_size=1, max_size=5)))
@settings(max_examples=80, deadline=None)
def test_every_table_comes_back(tmp_path_factory, grid):
    t = Table(pd.DataFrame(grid, columns=[f'c{i}' for i in range(len(grid[0]))], dtype=object), 'caption', seeds=(0, 1))
    path = t.save(tmp_path_factory.mktemp('t') / 'table')
    again = Table.load(path)
    assert str(again) == str(t) and again._repr_html_() == t._repr_html_() and again.to_markdown() == t.to_markdown()
    assert again.save(path.with_name('b')).read_bytes() == path.read_bytes()
    json.loads(path.read_text(), parse_constant=lambda c: pytest.fail(f'{c} is not JSON'))

def test_digits_survive(tmp_path):
    x = 1 / 3 + 1e-15
    back = Table.load(Table([dict(a=np.float64(x), b=np.int64(3), c=Interval(x, x, x))], 'c').save(tmp_path / 't.json')).rows.iloc[0]
    assert back.a == x and back.b == 3 and isinstance(back.b, int) and back.c == Interval(x, x, x)

def test_csv_has_ends_and_sources(tmp_path):
    Table([dict(m='x', IoU=Interval(.5, .4, .6), p=Published(.7, 'A 2020')), dict(m='y', IoU=.3, p=None)], 'c').save(tmp_path / 't')
    f = pd.read_csv(tmp_path / 't.csv')
    assert list(f.columns) == ['m', 'IoU', 'IoU low', 'IoU high', 'p', 'p source']
    assert f['IoU low'][0] == .4 and f['p source'][0] == 'A 2020' and np.isnan(f['p'][1])

def test_html_is_escaped_and_index_kept():
    t = Table(pd.DataFrame({'a<b': ['<script>x</script>']}, index=pd.Index(['i&j'], name='tag')), 'a <b> caption')
    h = t._repr_html_()
    assert '<script>' not in h and '&lt;script&gt;' in h and 'a &lt;b&gt; caption' in h and 'i&amp;j' in h

def test_caption_says_only_what_is_known():
    assert Table([dict(a=1)], 'One sentence.').full_caption() == 'One sentence.'
    assert Table([dict(a=1)], 'Words', seeds=0, profile='smoke', note='More').full_caption() == 'Words. Profile smoke; seed 0. More.'

def test_sources_are_numbered_once_each():
    t = Table([dict(m='x', p=Published(.7, 'A')), dict(m='y', p=Published(.6, 'B')), dict(m='z', p=Published(.5, 'A'))], 'c')
    assert [r[1] for r in t.cells()] == ['0.700¹', '0.600²', '0.500¹'] and t.notes() == ['1. A', '2. B']

@pytest.mark.parametrize('text', ['', '[]', '{"rows": []}', '{"caption": "x", "rows": 3}', 'null'])
def test_edited_file_is_named(tmp_path, text):
    (tmp_path / 't.json').write_text(text)
    with pytest.raises(InputError, match='t.json'): Table.load(tmp_path / 't')

def test_interval_without_ends():
    assert format_cell(Interval(.5, math.nan, math.nan)) == '0.500'

RECORDS = sorted((Path(__file__).parents[1]/'nbs/60_tables/records').glob('*/table.json'))

@pytest.mark.parametrize('file', RECORDS, ids=lambda f: f.parent.name)
def test_recorded_tables_name_their_run(file):
    "A committed table says what ran where, and lies beside the records of the stages that made it."
    t = Table.load(file)
    assert t.profile and t.backbone and t.seeds and t.hardware and len(t.rows)
    stages = json.loads((file.parent/'records.json').read_text())
    assert stages and all(s['config_hash'] and s['wall_s'] > 0 and s['hardware'] and s['packages'] for s in stages)
    assert all(s['commit'] for s in stages)
