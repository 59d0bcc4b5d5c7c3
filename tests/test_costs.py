"What labels cost, and what is made of them."
import json
from pathlib import Path

import matplotlib
import numpy as np
import pytest

from wsss_nb.data.items import Box, InputError, Item
from wsss_nb.evaluate.metrics import Interval
from wsss_nb.evaluate.report import evaluate_predictions
from wsss_nb.study.costs import cost_figure, cost_table, label_seconds, photo_seconds, printed_score
from wsss_nb.study.scenes import ScenesStudy, Step, scenes_settings
from wsss_nb.study.tables import Published, Table

matplotlib.use('agg')


def test_published_sums():
    "Bearman et al., ECCV 2016: 20.0, 23.3 and 239.7 s for a photo of VOC 2012; Bellver et al. 2019: 38.1 s with boxes."
    s = photo_seconds(20, 1.5, 2.8)
    assert s['tags'] == 20 and s['masks'] == pytest.approx(239.7, abs=.05) and s['boxes'] == pytest.approx(38.1, abs=.05)
    assert s['points'] - 2.4 == pytest.approx(23.3, abs=.05)        # the background's click is ours
    assert photo_seconds(20, 1, 1)['scribbles'] - 10.9 == pytest.approx(19 + 10.9)


def test_objects_are_counted():
    def photo(labels): return Item('a', 'a.jpg', (1,), boxes=tuple(Box(c, 0, 0, 4, 4) for c in labels))
    def of(*photos):
        class View(list): classes = ['cat', 'dog', 'cow']
        return label_seconds(View(photos))
    assert of(photo([1, 1, 3]))['boxes'] == 1 + 3 * 7
    assert of(photo([1, 1, 3]))['masks'] == 1 + 3 * 79
    assert of(photo([1, 1, 3]))['points'] == pytest.approx(1 + 3 * 2.4 + .9)
    assert of(photo([1, 1, 3]), photo([2]), photo([]))['boxes'] == (22 + 9) / 2
    with pytest.raises(InputError, match='has no boxes'): of(photo([]))


@pytest.fixture
def found(photos):
    from wsss_nb.data.voc import voc
    study = ScenesStudy(voc(photos), settings=scenes_settings('smoke'), workers=1)
    def step(kind, values):
        def guess(id, v): return np.where(np.random.default_rng(0).random(study.dataset.read_truth(study.dataset[id]).shape) < v, study.dataset.read_truth(study.dataset[id]), 0)
        return Step(kind, 'val', [evaluate_predictions({i: guess(i, v).astype(np.uint8) for i in study.dataset.split('val')}, study.dataset, 'val', name=kind) for v in values])
    return study, [('one', 'masks', step('masks', (.9, .8))), ('one', 'tags', step('tags', (.3, .2))), ('other', 'tags', step('tags', (.5, .5)))]


def test_table_and_figure(found, tmp_path):
    study, found = found
    t = cost_table(study, found)
    assert list(t.rows['labels']) == ['tags', 'tags', 'masks'] and list(t.rows['method']) == ['one', 'other', 'one']
    ax = cost_figure(study, found, tmp_path/'cost.png').axes[0]
    assert (tmp_path/'cost.png').is_file() and [x.get_text() for x in ax.get_legend().get_texts()] == ['one', 'other']
    lines = [line.get_xydata() for line in ax.lines if len(line.get_xydata()) == 2]
    seconds = label_seconds(study.dataset.view('boxes', 'train'))
    assert len(lines) == 3 and lines[2][:, 1].tolist() == [t.rows['mIoU'][2].low, t.rows['mIoU'][2].high]
    assert [x.get_text().split('\n')[0] for x in ax.get_xticklabels()] == ['tags', 'masks']
    means = [float(line.get_ydata()[0]) for line in ax.lines if len(line.get_xydata()) == 1]
    want = [np.mean([r.row()['mIoU'].value for r in t.results]) for _, _, t in (found[1], found[2], found[0])]
    assert means == pytest.approx(want) and max(lines[2][:, 0]) == pytest.approx(seconds['masks'])


def page(path, *tables):
    cells = [{'cell_type': 'markdown', 'source': 'network on CAM  0.9 [0.8, 1.0]  0.1'}]
    cells += [{'cell_type': 'code', 'source': '', 'outputs': [{'output_type': 'stream', 'text': 'x'}, {'data': {'text/plain': str(t).splitlines(True), 'text/html': t._repr_html_()}}]} for t in tables]
    path.write_text(json.dumps({'cells': cells}), encoding='utf-8')
    return path


def test_scores_of_other_pages(tmp_path):
    row = {'step': 'network on CAM', 'photos': 'val, 80', 'before': Interval(.1, .05, .2), 'spread': .5, 'after': Interval(.352, .291, .378), 'spread ': .031, 'published': Published(.6, 'someone')}
    p = page(tmp_path/'p.ipynb', Table([{'step': 'network on CAM', 'seed 0': .3}], 'Another'), Table([row | {'step': 'nothing', 'before': None, 'spread': None}, row], 'The table'))
    assert printed_score(p, 'network on CAM', 'after') == {'mIoU': Interval(.352, .291, .378), 'spread': .031}
    assert printed_score(p, 'network on CAM', 'before') == {'mIoU': Interval(.1, .05, .2), 'spread': .5}
    for wrong in (('CAM', 'after'), ('network on CAM', 'later')):
        with pytest.raises(InputError, match='p.ipynb.*shows no table.*Run the page again'): printed_score(p, *wrong)


def test_pages_show_the_scores_that_the_figure_of_costs_reads():
    tables = Path(__file__).parent.parent/'nbs/60_tables'
    for name, row, column in (('silop', 'network on CAM', 'mIoU'), ('silop', 'network on SILOP, through the walk', 'mIoU'), ('sccam', 'network on round 3', 'mIoU'), ('bana_3', 'noise-aware loss', 'before CRF')):
        m = printed_score(tables/f'{name}.ipynb', row, column)
        assert 0 < m['mIoU'].low < m['mIoU'].value < m['mIoU'].high < 1 and 0 <= m['spread'] < .2
