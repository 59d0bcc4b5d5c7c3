"Affinity learning: outputs of IRN, Puzzle-CAM and psa, equality with the gather form, learners, edge maps, hostile files."
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from wsss_nb.data.items import InputError, read_image
from wsss_nb.data.sample import sample
from wsss_nb.data.store import MapStore
from wsss_nb.data.voc import voc
from wsss_nb.localize.backbones import create_backbone
from wsss_nb.refine.affinity import (
    DisplacementBranch, EdgeLoss, FeatureAffinity, InstanceLoss, InstanceNet, affinity_loss, centre_displacements, create_edge_net, displacement_losses,
    displacement_map, edge_affinities, edge_learner, edge_map, edge_maps, feature_affinities, load_edges, pair_displacements, pair_labels, save_edges, train_edges)
from wsss_nb.refine.crf import agreement_labels, segment_labels
from wsss_nb.refine.walk import directions, interior, path_affinities, path_ends, paths, write_walks

GOLDEN = Path(__file__).parent/'golden'
tidy = settings(deadline=None, max_examples=15)


def golden(name): return {k: v for k, v in np.load(GOLDEN/f'{name}.npz', allow_pickle=False).items()}


def tensor(a): return torch.from_numpy(np.ascontiguousarray(a))


# The originals' own outputs

def test_pair_labels_and_losses_of_irn():
    z = golden('affinity_labels_losses')
    labels = [v.expand(2, -1, -1, -1) for v in pair_labels(tensor(z['seg']).long()[None], 5)]
    for name, v in zip(('bg_pos', 'fg_pos', 'neg'), labels): assert np.array_equal(v[0].flatten(1).numpy(), z[name] > 0)
    a = edge_affinities(tensor(z['edge'])[:, 0], 5)
    assert np.allclose(a.flatten(2).numpy(), z['aff'], atol=1e-6)
    assert affinity_loss(a, *labels).item() == pytest.approx(z['loss'], abs=1e-5)
    nothing = torch.zeros_like(labels[0])
    for k, name in enumerate(('bg_loss', 'fg_loss', 'neg_loss')):
        alone = [v if n == k else nothing for n, v in enumerate(labels)]
        assert affinity_loss(a, *alone).item() * (4, 4, 2)[k] == pytest.approx(z[name], abs=1e-5)
    d = tensor(z['disp'])
    assert np.allclose(pair_displacements(d, 5).flatten(3).numpy(), z['pair_disp'], atol=1e-6)
    fg, bg = (v.item() for v in displacement_losses(d, *labels[:2], 5))
    assert (fg, bg) == (pytest.approx(z['dp_fg_loss'], abs=1e-5), pytest.approx(z['dp_bg_loss'], abs=1e-5))
    assert affinity_loss(a, *labels).item() + (fg + bg) / 2 == pytest.approx(z['irn_total'], abs=2e-5)
    outputs = torch.cat([tensor(z['edge']).logit(), d], 1)
    assert InstanceLoss(5)(outputs, tensor(z['seg']).long()[None].expand(2, -1, -1)).item() == pytest.approx(z['irn_total'], abs=2e-5)


def test_psa():
    z = golden('affinity_psa')
    net = FeatureAffinity((4, 5, 6), (3, 4, 5))
    with torch.no_grad():
        for conv, k in zip([*net.stages, net.join], ('w_f8_3', 'w_f8_4', 'w_f8_5', 'w_f9')): conv.weight.copy_(tensor(z[k]))
        a = net([tensor(z[k]) for k in ('conv4', 'conv5', 'conv6')])
    assert np.allclose(a.flatten(2).numpy(), z['aff'], atol=1e-6)
    labels = pair_labels(tensor(z['seg16']).long()[None], 5, directions(5))
    for name, v in zip(('bg16', 'fg16', 'neg16'), labels): assert np.array_equal(v[0].flatten(1).numpy(), z[name] > 0)
    assert affinity_loss(tensor(z['aff_rand']), *(v.flatten(2) for v in labels)).item() == pytest.approx(z['loss'], abs=1e-5)


@pytest.mark.parametrize('image', ['000002', '000003'])
def test_confident_labels_of_puzzle_and_silop(image):
    z = golden(f'silop_aff_label_{image}')
    for name, maps, fg, bg in (('aff_label_combined_fg060_bg040', 'combined_hr_cam', .6, .4), ('aff_label_puzzle_fg040_bg010', 'hr_cam', .4, .1)):
        labels = segment_labels(agreement_labels(z['image_rgb'], z[maps], fg, bg), z['keys'][1:])
        assert (labels == z[name]).mean() >= .99


# The running maximum is the gather

def gathered(edge, radius):
    rows, cols = interior(edge.shape[1:], radius)
    width = edge.shape[2]
    start = (torch.arange(rows.stop)[:, None] * width + torch.arange(cols.start, cols.stop)).flatten()
    groups = [torch.tensor(g) @ torch.tensor([width, 1]) for g in paths(radius)]
    return 1 - torch.cat([edge.flatten(1)[:, start[None, None] + g[..., None]].amax(2) for g in groups], 1)


@tidy
@given(st.sampled_from([2, 3, 5]), st.integers(0, 4), st.integers(0, 5), st.integers(0, 999))
def test_values_and_gradients_of_the_gather_form(radius, more_h, more_w, seed):
    torch.manual_seed(seed)
    edge = torch.rand(2, radius + more_h, 2 * radius - 1 + more_w, dtype=torch.float64, requires_grad=True)
    a, b = edge_affinities(edge, radius), gathered(edge, radius)
    assert torch.equal(a.flatten(2), b)
    w = torch.rand_like(b)
    for x, y in zip(*(torch.autograd.grad((v.flatten(2) * w).sum(), edge) for v in (a, b))): assert torch.allclose(x, y, atol=1e-12)
    inside = path_affinities(edge[0].detach().numpy(), radius)[:, *interior(edge.shape[1:], radius)]
    assert np.allclose(a[0].detach().numpy(), inside)


@tidy
@given(st.integers(0, 999), st.sampled_from([2, 3, 5]))
def test_pair_labels_by_definition(seed, radius):
    rng = np.random.default_rng(seed)
    y = rng.choice([0, 0, 1, 2, 200, 254, 255], (radius + 3, 2 * radius + 2))
    got = [v[0].numpy() for v in pair_labels(torch.from_numpy(y)[None], radius)]
    rows, cols = interior(y.shape, radius)
    for k, (dy, dx) in enumerate(path_ends(radius)):
        for r in range(rows.stop):
            for c in range(cols.stop - cols.start):
                a, b = y[r, cols.start + c], y[r + dy, cols.start + c + dx]
                known = a < 254 and b < 254
                assert [v[k, r, c] for v in got] == [known and a == b == 0, known and a == b > 0, known and a != b]
    assert not (got[0] & got[1] | got[1] & got[2] | got[0] & got[2]).any()


def test_one_class_or_nothing_known_is_finite():
    for level in (0, 7, 255):
        z = torch.randn(1, 1, 12, 16, requires_grad=True)
        loss = EdgeLoss(5)(z, torch.full((1, 24, 32), level))
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(z.grad).all() and (loss.item() > 0) == (level < 255)
    extreme = torch.tensor([-100., 100.]).repeat(96)[:192].reshape(1, 1, 12, 16).requires_grad_()
    EdgeLoss(5)(extreme, torch.randint(0, 2, (1, 12, 16))).backward()
    assert torch.isfinite(extreme.grad).all()


def test_feature_affinities():
    f = torch.randn(1, 6, 12, 14)
    a = feature_affinities(f)
    assert a.shape == (1, 34, 8, 6) and ((a > 0) & (a <= 1)).all()
    dy, dx = directions(5)[20]
    assert a[0, 20, 2, 3].item() == pytest.approx(torch.exp(-(f[0, :, 2, 7] - f[0, :, 2 + dy, 7 + dx]).abs().mean()).item(), abs=1e-6)


# The network

@pytest.fixture(scope='module')
def view():
    "Four images of the VOC sample."
    v = voc(sample()/'voc'/'VOC2012').view('tags', 'train')
    return v.keep(lambda o: o.id in v.ids[:4])


def blocks(item):
    "Labels of three classes and void, of any image, without a file."
    y = np.zeros((64, 64), np.uint8)
    y[10:40, 20:50], y[40:, 30:], y[:8] = 3, 9, 255
    return y


KW = dict(size=64, bs=2, radius=3, pretrained=False)


def weights(learn): return torch.cat([v.flatten().float().cpu() for v in learn.model.state_dict().values()])


@pytest.mark.parametrize('name', ['tf_efficientnet_lite0', 'resnet18'])
def test_any_backbone(name):
    net = create_edge_net(name, pretrained=False)
    for h, w in ((64, 96), (96, 64)): assert net(torch.randn(1, 3, h, w)).shape == (1, 1, h // 4, w // 4)
    assert {p.requires_grad for p in net.backbone.parameters()} == {False}
    net.train()
    assert not any(m.training for m in net.backbone.modules()) and net.stages.training


def test_a_network_without_stages_is_refused():
    with pytest.raises(InputError, match='stages'): create_edge_net(torch.nn.Conv2d(3, 4, 1))


def test_training_changes_the_branch_and_nothing_else(view):
    learn = edge_learner(view, blocks, **KW)
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    assert sum(p.numel() for p in learn.splitter(learn.model)[0]) == sum(v.numel() for k, v in before.items() if not k.startswith('backbone'))
    with learn.no_bar(), learn.no_logging(): learn.fit(1, .05)
    assert not torch.is_anomaly_enabled()
    for k, v in learn.model.state_dict().items(): assert torch.equal(v, before[k]) == k.startswith('backbone'), k


def test_with_augmentation(view):
    "New crops every time; label maps of the images' own sizes, 254 counts as void."
    def labels(item):
        y = np.zeros(read_image(item.image).shape[:2], np.uint8)
        y[:, y.shape[1] // 2:], y[:5] = 7, 254
        return y
    learn = edge_learner(view, labels, augment=True, **KW)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, .05)
    assert np.isfinite([v.item() for v in learn.recorder.losses]).all()


def test_same_seed_same_weights_and_resume(view, tmp_path):
    backbone = create_backbone(pretrained=False)
    def train(epochs, path=None): return train_edges(view, blocks, epochs, path=path, backbone=backbone, **KW)
    a, b = train(2), train(2, tmp_path/'c.pth')
    assert torch.equal(weights(a), weights(b))
    state = torch.load(tmp_path/'c.pth', weights_only=True)
    assert state['epoch'] == 2
    assert torch.equal(weights(train(2, tmp_path/'c.pth')), weights(b))     # finished: nothing is done again


def test_the_loss_puts_the_edge_on_the_border():
    "From labels of two halves alone, each row gets an edge next to their border and none elsewhere."
    y = torch.zeros(1, 32, 32).long(); y[..., 16:] = 5
    torch.manual_seed(0)
    z = (.01 * torch.randn(1, 1, 16, 16)).requires_grad_()
    opt = torch.optim.Adam([z], .3)
    for _ in range(60): opt.zero_grad(); EdgeLoss(4)(z, y).backward(); opt.step()
    e = z.sigmoid()[0, 0, :13]
    assert e[:, 7:9].amax(1).min() > .5 > max(e[:, 3:6].max(), e[:, 10:13].max())


@pytest.mark.parametrize('size', [(1, 1), (31, 33), (64, 64), (130, 45)])
def test_no_image_is_cut(size):
    net = create_edge_net(pretrained=False)
    e = edge_map(net, torch.randn(1, 3, *size))
    assert e.shape == (1, -(-size[0] // 4), -(-size[1] // 4)) and ((e >= 0) & (e <= 1)).all()


def test_padding_is_no_edge():
    "An image of one colour is the same with or without a border to pad."
    net = create_edge_net(pretrained=False)
    small, large = (edge_map(net, torch.full((1, 3, h, w), .7)) for h, w in ((40, 50), (64, 64)))
    assert torch.allclose(small, large[:, :10, :13], atol=1e-5)


@pytest.mark.parametrize('size', [(64, 64), (64, 96)])
def test_mirrored_image_mirrored_edges(size):
    net, x = create_edge_net(pretrained=False), torch.randn(1, 3, *size)
    assert torch.allclose(edge_map(net, x.flip(3)).flip(2), edge_map(net, x), atol=1e-5)


def test_the_mean_of_both_is_on_one_grid():
    "A width that the stride does not divide: the logits of the mirror image come back to the places that they are of."
    net, x = create_edge_net(pretrained=False), torch.randn(1, 3, 40, 50)
    padded = torch.nn.functional.pad(x, (0, 14, 0, 24), mode='replicate')
    with torch.inference_mode(): expected = ((net(padded) + net(padded.flip(3)).flip(3)) / 2).sigmoid()[:, 0, :10, :13]
    assert torch.equal(edge_map(net, x), expected)


def test_an_image_without_tags_is_background():
    image = np.random.default_rng(0).integers(0, 256, (16, 20, 3)).astype(np.uint8)
    assert not agreement_labels(image, np.zeros((0, 16, 20), np.float32)).any()


@pytest.mark.parametrize('momentum', [.9, 1e-4])
def test_momentum_is_what_is_asked_for(view, momentum):
    learn = edge_learner(view, blocks, momentum=momentum, **KW)
    learn.create_opt()
    assert learn.opt.hypers[0]['mom'] == momentum and learn.opt.hypers[0]['wd'] != momentum


# Displacements

def test_the_branch_of_irn():
    "Widths, groups and joins for the stages of a ResNet-50; sizes; nothing of it is biased."
    net = DisplacementBranch((64, 256, 512, 1024, 2048))
    assert [(c.out_channels, g.num_groups) for c, g in net.stages] == [(64, 8), (128, 16), (256, 16), (256, 16), (256, 16)]
    (a, g), ((b, h), _, c) = net.coarse, net.join
    assert [(v.in_channels, v.out_channels) for v in (a, b, c)] == [(768, 256), (448, 256), (256, 2)] and g.num_groups == h.num_groups == 16
    assert not any(m.bias is not None for m in net.modules() if isinstance(m, torch.nn.Conv2d))
    sizes = (32, 32, 16, 8, 8)
    d = net([torch.randn(2, s[0].in_channels, n, n + 4) for s, n in zip(net.stages, sizes)], (32, 36))
    assert d.shape == (2, 2, 32, 36)


@pytest.mark.parametrize('name, stages', [('tf_efficientnet_lite0', 5), ('resnet18', 5), ('convnext_atto', 4)])
def test_displacements_of_any_backbone(name, stages):
    net = create_edge_net(name, 32 if stages == 4 else 16, pretrained=False, instances=True)
    assert isinstance(net, InstanceNet) and len(net.displacement.stages) == stages
    assert net(torch.randn(1, 3, 64, 96)).shape == (1, 3, 16, 24)
    x = torch.randn(1, 3, 37, 50)
    assert displacement_map(net, x).shape == (1, 2, 10, 13) and edge_map(net, x).shape == (1, 10, 13)


def test_displacements_learn_at_a_rate_of_their_own(view):
    "Two groups, both trained, the backbone not; the rates fall from 0.1 and 1."
    learn = edge_learner(view, blocks, instances=True, **KW)
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    groups = learn.splitter(learn.model)
    assert [sum(p.numel() for p in g) for g in groups] == [sum(v.numel() for k, v in before.items() if k.startswith(n) and k != 'displacement.mean') for n in (('stages', 'join'), 'displacement')]
    learn = train_edges(view, blocks, 1, lr=.1, momentum=1e-4, instances=True, **KW)
    assert learn.opt.hypers[1]['lr'] == pytest.approx(10 * learn.opt.hypers[0]['lr']) and 0 < learn.opt.hypers[0]['lr'] < .1
    for k, v in learn.model.state_dict().items(): assert torch.equal(v, before[k]) == k.startswith('backbone'), k


def test_the_mean_displacement_counts_every_image_once(view):
    "Whatever the batches, the last and smaller one too; subtracted in evaluation mode only."
    torch.manual_seed(0)
    net = create_edge_net(pretrained=False, instances=True)
    three = view.keep(lambda o: o.id in view.ids[:3])
    means = []
    for bs in (1, 2, 3):
        assert centre_displacements(net, three, 64, bs) == []
        means.append(net.displacement.mean.clone())
    assert all(torch.allclose(m, means[0], atol=1e-5) for m in means) and means[0].abs().max() > 1e-3
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        centred = net(x)
        net.displacement.mean.zero_()
        assert torch.allclose(net(x)[:, 1:] - means[0][:, None, None], centred[:, 1:], atol=1e-6) and torch.equal(net(x)[:, :1], centred[:, :1])
        net.displacement.mean.copy_(means[0])
        assert torch.allclose(net.train()(x)[:, 1:], centred[:, 1:] + means[0][:, None, None], atol=1e-5)


def test_trained_saved_and_resumed_with_its_mean(view, tmp_path):
    backbone = create_backbone(pretrained=False)
    def train(path=None): return train_edges(view, blocks, 2, path=path, backbone=backbone, instances=True, momentum=1e-4, **KW)
    a, b = train(), train(tmp_path/'c.pth')
    again = train(tmp_path/'c.pth')         # finished: only the mean is measured
    assert torch.equal(weights(a), weights(b)) and torch.equal(weights(again), weights(b))
    assert again.model.displacement.mean.abs().min() > 0
    save_edges(b, tmp_path/'net', dict(backbone='tf_efficientnet_lite0', output_stride=16, stride=4, instances=True))
    net, x = load_edges(tmp_path/'net'), torch.randn(1, 3, 40, 50)
    assert isinstance(net, InstanceNet) and torch.equal(displacement_map(net, x), displacement_map(b.model.eval(), x))


def test_the_loss_points_to_common_centres():
    "From labels of two objects alone, displacements learned freely bring the pixels of each to one place of their own."
    y = torch.zeros(1, 16, 32).long()
    y[:, 3:13, 3:13], y[:, 3:13, 19:29] = 5, 6
    torch.manual_seed(0)
    z = torch.zeros(1, 3, 16, 32, requires_grad=True)
    opt = torch.optim.Adam([z], .2)
    loss = InstanceLoss(5)
    for _ in range(150): opt.zero_grad(); loss(z, y).backward(); opt.step()
    d = z.detach()[0, 1:].numpy()
    for cols in (slice(3, 13), slice(19, 29)):
        ends = (np.indices((16, 32)) + d)[:, 3:13, cols].reshape(2, -1)
        assert ends.std(1).max() < 1 < np.indices((10, 10)).reshape(2, -1).std(1).min()


def test_edge_maps_of_a_view(view, tmp_path):
    net, store = create_edge_net(pretrained=False), MapStore(tmp_path/'edges')
    assert edge_maps(net, view, store) == [] and sorted(store.ids()) == sorted(view.ids)
    times = [store.path(o.id).stat().st_mtime_ns for o in view]
    store.path(view.ids[1]).unlink()
    assert edge_maps(net, view, store) == []
    assert [store.path(o.id).stat().st_mtime_ns == t for o, t in zip(view, times)] == [True, False, True, True]
    assert write_walks(view, store, store, MapStore(tmp_path/'walked'), workers=1) == []


def test_a_broken_image_is_named(view, tmp_path):
    from dataclasses import replace
    (tmp_path/'bad.jpg').write_bytes(b'\xff\xd8\xff no image')
    items = [replace(view[0], id='bad', image=tmp_path/'bad.jpg'), view[1]]
    store = MapStore(tmp_path/'edges')
    failed = edge_maps(create_edge_net(pretrained=False), items, store)
    assert [i for i, _ in failed] == ['bad'] and store.ids() == [view[1].id]


def test_wrong_sizes_are_refused(view):
    with pytest.raises(ValueError, match='multiple of 32'): edge_learner(view, blocks, size=100)
    with pytest.raises(ValueError, match='radius 10'): edge_learner(view, blocks, size=64)
    with pytest.raises(InputError, match='no images'): edge_learner(view.keep(lambda o: False), blocks, **KW)


# Files

@pytest.fixture
def saved(view, tmp_path):
    learn = edge_learner(view, blocks, **KW)
    save_edges(learn, tmp_path/'net', dict(backbone='tf_efficientnet_lite0', output_stride=16, stride=4))
    return learn.model.eval(), tmp_path/'net'


def test_saved_and_loaded(saved):
    net, folder = saved
    x = torch.randn(1, 3, 40, 50)
    assert torch.equal(edge_map(load_edges(folder), x), edge_map(net, x))
    assert sorted(p.name for p in folder.iterdir()) == ['edges.json', 'edges.safetensors']


@pytest.mark.parametrize('spoil', ['json', 'weights', 'other', 'missing'])
def test_hostile_networks_are_refused(saved, spoil):
    _, folder = saved
    if spoil == 'json': (folder/'edges.json').write_text('{"backbone": 3}')
    if spoil == 'weights': (folder/'edges.safetensors').write_bytes(b'\x80\x04K\x01.')
    if spoil == 'other': save_file({k: v for k, v in load_file(folder/'edges.safetensors').items() if 'join' not in k}, folder/'edges.safetensors')
    if spoil == 'missing': (folder/'edges.safetensors').unlink()
    with pytest.raises(InputError, match='not a readable edge network'): load_edges(folder)
    assert spoil == 'json' or json.loads((folder/'edges.json').read_text())['stride'] == 4
