"""CCAM against the originals' arrays, its properties, two processes, killed runs and hostile files."""
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from wsss_nb.data.items import InputError
from wsss_nb.data.pets import pets
from wsss_nb.data.sample import sample
from wsss_nb.data.store import Maps, MapStore
from wsss_nb.localize import ccam as module
from wsss_nb.localize.backbones import create_backbone
from wsss_nb.localize.cam import CamClassifier
from wsss_nb.localize.ccam import (CCAM, RECIPES, CCAMLoss, Disentangler, FeatureCache, Polarity, PolySchedule, cache_features,
                                   cam_cue, ccam, ccam_learner, centre_cue, check_positive_wsol, check_positive_wsss, cosines, create_ccam,
                                   decide_polarity, find_recipe, load_ccam, negative_loss, original_hr_map, original_map, pool_pair,
                                   positive_loss, rank_weights, save_ccam, train_class_ccams, write_ccams)

GOLDEN = Path(__file__).parent/'golden'


def arrays(name):
    with np.load(GOLDEN/f'pets_{name}.npz', allow_pickle=False) as z: return {k: z[k] for k in z}


def tensors(name): return {k: torch.from_numpy(v) for k, v in arrays(name).items() if v.dtype.kind in 'fiub'}


def close(a, b, tol=1e-5):
    a, b = (torch.as_tensor(v).detach().numpy() for v in (a, b))
    assert a.shape == b.shape and np.allclose(a, b, atol=tol, rtol=tol)


class Stages(nn.Module):
    "A backbone of one convolution whose features are split into two stages."
    def __init__(self, weight, stride):
        super().__init__()
        n, c, k, _ = weight.shape
        self.conv = nn.Conv2d(c, n, k, stride, bias=False)
        self.conv.weight.data = weight.clone()
    def forward_intermediates(self, x, indices, intermediates_only):
        f = self.conv(x).relu()
        n = f.shape[1] // 2
        return [f[:, n:], f[:, :n]]         # the deeper stage is concatenated first


@pytest.fixture(scope='module')
def view(): return pets(sample(profile='smoke')/'pets', classes='breeds').view('tags', 'trainval')


@pytest.fixture(scope='module')
def cache(view): return cache_features(create_ccam(pretrained=False), view, 64)


def quietly(learn):
    "No table of epochs."
    learn.remove_cbs([cb for cb in learn.cbs if isinstance(cb, ProgressCallback)])
    return learn


# ---- head

def golden_head(z):
    head = Disentangler(6)
    head.conv.weight.data = z['conv_weight'].clone()
    head.norm.weight.data, head.norm.bias.data = z['bn_weight'].clone(), z['bn_bias'].clone()
    head.norm.running_mean.data, head.norm.running_var.data = z['bn_running_mean0'].clone(), z['bn_running_var0'].clone()
    head.norm.eps, head.norm.momentum = float(z['bn_eps']), float(z['bn_momentum'])
    return head


def test_disentangler():
    "C2AM's head in its three modes, its running statistics and its gradients."
    z = tensors('c2am_disentangler')
    head = golden_head(z).eval()
    for ours, theirs in zip(head(z['x']), ('fg', 'bg', 'ccam')): close(ours, z[f'eval_sig_{theirs}'])
    logits = head.logits(z['x'])
    close(logits, z['eval_inf_ccam'])
    for ours, theirs in zip(pool_pair(z['x'], logits), ('fg', 'bg')): close(ours, z[f'eval_inf_{theirs}'])
    head, x = golden_head(z).train(), z['x'].clone().requires_grad_()
    out = head(x)
    for ours, theirs in zip(out, ('fg', 'bg', 'ccam')): close(ours, z[f'train_{theirs}'])
    close(head.norm.running_mean, z['bn_running_mean1']), close(head.norm.running_var, z['bn_running_var1'])
    loss = CCAMLoss(.25)(out)
    close(loss, z['train_total_a0_25'])
    loss.backward()
    close(x.grad, z['grad_x']), close(head.conv.weight.grad, z['grad_conv'])
    close(head.norm.weight.grad, z['grad_bn_weight']), close(head.norm.bias.grad, z['grad_bn_bias'])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 6), st.integers(1, 6), st.integers(0, 99))
def test_the_two_parts_add_up_to_the_average(n, c, h, w, seed):
    g = torch.Generator().manual_seed(seed)
    f, p = torch.randn(n, c, h, w, generator=g), torch.rand(n, 1, h, w, generator=g)
    fg, bg = pool_pair(f, p)
    close(fg + bg, f.mean((2, 3)))
    close(fg, (f * p).mean((2, 3)))


# ---- losses

@pytest.mark.parametrize('case', ['a', 'b', 'single', 'pair'])
def test_losses(case):
    z = tensors('c2am_losses')
    fg, bg = (z[f'{case}_{k}'].clone().requires_grad_() for k in ('fg', 'bg'))
    n = len(fg)
    close(cosines(fg, fg), z[f'{case}_cos_fg_fg']), close(cosines(bg, fg), z[f'{case}_cos_bg_fg'])
    close(negative_loss(bg, fg), z[f'{case}_simmin_mean']), close(negative_loss(bg, fg) * n**2, z[f'{case}_simmin_sum'])
    for alpha in ('0.05', '0.25', '0.3', '0.75', '0.8'):
        for k, v in (('fg', fg), ('bg', bg)):
            close(positive_loss(v, float(alpha)), z[f'{case}_simmax_{k}_a{alpha}_mean'])
            close(positive_loss(v, float(alpha)) * n**2, z[f'{case}_simmax_{k}_a{alpha}_sum'])
    total = CCAMLoss(.25)((fg, bg))
    close(total, z[f'{case}_total_a0.25']), close(CCAMLoss(.25)((bg, fg)), z[f'{case}_total_swapped_a0.25'])
    total.backward()
    close(fg.grad, z[f'{case}_grad_fg']), close(bg.grad, z[f'{case}_grad_bg'])


def test_losses_of_odd_vectors():
    "Negative cosines, collinear rows (whose ranks are not compared), vectors of zeros."
    z = tensors('c2am_losses')
    s = z['signed']
    close(cosines(s, s), z['signed_cos']), close(positive_loss(s, .25), z['signed_simmax_a0.25_mean'])
    close(negative_loss(s, s.flip(0)), z['signed_simmin_mean'])
    close(cosines(z['dup'], z['dup']), z['dup_cos'])
    zero = torch.zeros(3, 5, requires_grad=True)
    close(positive_loss(zero, .25), z['zero_simmax_a0.25_mean'], 1e-4), close(negative_loss(zero, zero), z['zero_simmin_mean'])
    (positive_loss(zero, .25) + negative_loss(zero, zero)).backward()
    assert zero.grad.eq(0).all()


def test_rank_weights():
    "Photos 1 and 5 are collinear and tie in every row: between them any order is right, all else is compared."
    z = tensors('c2am_rank_weights')
    s = cosines(z['x'], z['x'])
    close(s, z['cos'])
    ours, alone, tied = rank_weights(s, .25), [0, 2, 3, 4], [1, 5]
    close(ours[:, alone], z['rank_weight_a0.25'][:, alone])
    close(ours[:, tied].sort(1)[0], z['rank_weight_a0.25'][:, tied].sort(1)[0])
    for alpha in (0., .05, .25, .8):
        matrix = rank_weights(s, alpha) * -s.log()
        close(matrix[:, alone], z[f'simmax_matrix_a{alpha}'][:, alone])
        close(matrix.sum(1), z[f'simmax_matrix_a{alpha}'].sum(1))


def plain_weights(s, alpha, mask):
    "Loops: count what is nearer, ties by position."
    n = len(s)
    w = torch.zeros(n, n)
    for i in range(n):
        for j in range(n):
            if mask and i == j: continue
            nearer = sum(bool(s[i, k] > s[i, j]) or (bool(s[i, k] == s[i, j]) and k < j) for k in range(n) if not (mask and k == i))
            w[i, j] = float(np.exp(-alpha * (nearer - (0 if mask else 1))))
    return w


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7), st.floats(0, 1), st.booleans(), st.booleans(), st.integers(0, 999))
def test_rank_weights_count_what_is_nearer(n, alpha, mask, ties, seed):
    s = torch.rand(n, n, generator=torch.Generator().manual_seed(seed))
    if ties: s = (s * 3).round() / 3
    close(rank_weights(s, alpha, mask), plain_weights(s, alpha, mask))


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 9), st.floats(0, 1), st.booleans(), st.integers(0, 999))
def test_loss_does_not_know_the_side(n, alpha, mask, seed):
    a, b = torch.randn(2, n, 6, generator=torch.Generator().manual_seed(seed))
    loss = CCAMLoss(alpha, mask)
    assert abs(loss((a, b)) - loss((b, a))) < 1e-5


def test_masked_diagonal_is_the_mean_over_pairs():
    v = torch.rand(5, 8, generator=torch.Generator().manual_seed(1))
    s = cosines(v, v)
    close(positive_loss(v, 0., True), -s.log()[~torch.eye(5, dtype=bool)].mean())
    assert positive_loss(v[:1], .25, True) == 0


def test_half_precision_is_computed_in_float32():
    a, b = torch.rand(2, 6, 300, generator=torch.Generator().manual_seed(0))
    with torch.autocast('cpu', torch.bfloat16): got = CCAMLoss(.25)((a, b))
    close(got, CCAMLoss(.25)((a, b)), 1e-6)


# ---- recipes

def test_poly_optimizer():
    "C2AM's and Puzzle-CAM's PolyOptimizer: weight decay in the place of the momentum (C-1)."
    z = arrays('c2am_polyoptimizer')
    for name in ('wsss', 'puzzle_optim_utils'):
        traj, lrs, mom = z[f'{name}_traj'], z[f'{name}_lrs'], float(z[f'{name}_group_momentum'][0])
        assert mom == float(z[f'{name}_group_wd'][0]) and find_recipe('original').momentum == find_recipe('original').weight_decay
        p = [nn.Parameter(torch.tensor(v)) for v in traj[0]]
        learn = module._learner(head_for(0), DataLoaders(DataLoader([], bs=1), DataLoader([], bs=1)), find_recipe('original', momentum=mom))
        opt = learn.opt_func([[p[0]], [p[1]]], lr=.1)
        opt.set_hypers(wd=z[f'{name}_group_wd'][:2].tolist())
        schedule = PolySchedule([.1, .2])
        schedule.opt = opt
        for k, g in enumerate(z['grads']):
            schedule._update_val(min(k, 4) / 5)         # after the last step the original keeps the rate
            close([h['lr'] for h in opt.hypers], lrs[k, :2], 1e-8)
            for q, v in zip(p, g): q.grad = torch.tensor(v)
            opt.step()
            close(torch.stack([q.detach() for q in p]), traj[k + 1], 1e-6)


def test_parameter_groups():
    "C2AM's lists hold all convolutions, the head among them at the base rate, and no normalisation (C-2)."
    z = arrays('c2am_param_groups')
    net = create_ccam('resnet50', pretrained=False, frozen=False)
    backbone, head = module._groups(RECIPES['original'], net)
    assert len(backbone) + len(head) == z['group_lens'][0]
    assert sum(p.numel() for p in backbone + head) == z['group_numel'][0]
    assert sum(p.numel() for p in net.parameters()) - z['group_numel'][0] == z['n_params_not_in_any_group']
    assert module._rates(RECIPES['original'], net) == [1e-3, 1e-3]
    assert sum(p.numel() for g in module._groups(RECIPES['intended'], net) for p in g) == z['n_params']
    assert np.allclose(module._rates(RECIPES['intended'], net), [1e-3, 1e-2])


@pytest.mark.parametrize('size', [0, 1])
def test_feature_shapes(size):
    side, *shape = arrays('c2am_param_groups')['feat_shapes'][size]
    net = create_backbone('resnet50', pretrained=False).eval()
    with torch.inference_mode(): f = module.last_stages(net, torch.randn(1, 3, side, side))
    assert f.shape == tuple(shape) and f.min() >= 0


def test_one_step_of_the_pets_system():
    "Forward, losses and weights after one SGD step of train_CCAM, through the learner's own optimiser and groups."
    z = tensors('seed1_train_step')
    mean, std = (torch.tensor(v)[:, None, None] for v in ((.485, .456, .406), (.229, .224, .225)))
    x = (z['images_u8'] / 255 - mean) / std
    x = x if x.shape[1] == 3 else x.permute(0, 3, 1, 2)
    net = CCAM(Stages(z['init.backbone.init_model.conv.weight'], 16), 6).train()
    net.head.conv.weight.data = z['init.ac_head.activation_head.weight'].clone()
    out = net(x)
    for ours, theirs in zip(out, ('fg', 'bg', 'ccam')): close(ours, z[f'fwd_{theirs}'])
    recipe = RECIPES['original-pets']
    assert check_positive_wsss(out[2]) == bool(z['flag'])
    close(positive_loss(out[0], recipe.alpha), z['l1'], 1e-4), close(negative_loss(out[1], out[0]), z['l2']), close(positive_loss(out[1], recipe.alpha), z['l3'], 1e-4)
    net.head.norm.reset_running_stats()
    dls = DataLoaders(DataLoader([(i, 0) for i in x], bs=3, num_workers=0), DataLoader([], bs=3), device='cpu')
    learn = quietly(module._learner(net, dls, recipe))
    with learn.no_logging(): module.fit(learn, 1, learn.lr, wd=recipe.weight_decay, schedule=PolySchedule(learn.lr, recipe.power))
    close(learn.recorder.losses[-1], z['ccam_running_loss'], 1e-4)
    close(net.backbone.conv.weight, z['ccam_after.backbone.init_model.conv.weight'], 1e-6)
    close(net.head.conv.weight, z['ccam_after.ac_head.activation_head.weight'], 1e-6)
    close(net.head.norm.weight, z['ccam_after.ac_head.bn_head.weight'], 0), close(net.head.norm.bias, z['ccam_after.ac_head.bn_head.bias'], 0)
    close(net.head.norm.running_mean, z['ccam_after.ac_head.bn_head.running_mean']), close(net.head.norm.running_var, z['ccam_after.ac_head.bn_head.running_var'])
    assert not torch.equal(net.head.conv.weight, z['init.ac_head.activation_head.weight'])


# ---- processes

def _process(rank, world, folder, state, f):
    os.environ.update(MASTER_ADDR='127.0.0.1', GLOO_SOCKET_IFNAME='lo')
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=world)
    head = Disentangler(f.shape[1])
    head.load_state_dict(state)
    parallel = nn.parallel.DistributedDataParallel(head)
    loss = CCAMLoss(.25, True)(parallel(f.chunk(world)[rank]))
    loss.backward()
    torch.save({'loss': loss.detach(), **{k: p.grad for k, p in head.named_parameters()}, 'var': head.norm.running_var}, f'{folder}/{rank}.pth')
    dist.destroy_process_group()


def test_two_processes(tmp_path):
    "Loss, gradients and running statistics of two processes are those of one (C-6)."
    torch.manual_seed(0)
    f, head = torch.rand(8, 5, 4, 6), Disentangler(5)
    with torch.no_grad(): head.norm.weight.fill_(1.3), head.norm.bias.fill_(-.2)
    mp.spawn(_process, (2, str(tmp_path), head.state_dict(), f), nprocs=2)
    loss = CCAMLoss(.25, True)(head(f))
    loss.backward()
    for rank in range(2):
        got = torch.load(tmp_path/f'{rank}.pth', weights_only=True)
        close(got['loss'], loss, 1e-6), close(got['var'], head.norm.running_var, 1e-6)
        for k, p in head.named_parameters(): close(got[k], p.grad, 1e-5)


# ---- polarity

def test_polarity_tests_of_c2am():
    z = tensors('c2am_check_positive_wsss')
    assert [check_positive_wsss(m) for m in z['maps']] == z['wsss_flag'].tolist()
    z = tensors('c2am_check_positive_wsol')
    for k in '12':
        before = z[f'in{k}'].clone()
        assert check_positive_wsol(before) == bool(z[f'flag{k}'])
        assert torch.equal(before, z[f'in{k}'])         # ours leaves its input alone


def blobs(n, low=0., seed=0):
    "Features of two channels: object in the middle, scenery elsewhere, with noise."
    g = torch.Generator().manual_seed(seed)
    m = torch.full((n, 1, 8, 8), low)
    m[..., 2:7, 2:6] = 1.
    return torch.cat([m, 1 - m], 1) + .1 * torch.rand(n, 2, 8, 8, generator=g)


def head_for(channel):
    "A network whose P is high where the given channel is."
    net = CCAM(nn.Linear(1, 1), 2, frozen=True).eval()
    with torch.no_grad():
        net.head.conv.weight.zero_()
        net.head.conv.weight[0, channel, 1, 1], net.head.conv.weight[0, 1 - channel, 1, 1] = 4, -4
    return net


@pytest.mark.parametrize('rule', ['centre', 'frame', 'cam'])
@pytest.mark.parametrize('channel', [0, 1])
def test_polarity_over_all_training_images(rule, channel, tmp_path):
    f = blobs(6)
    table, store = FeatureCache(f[:, None], list('abcdef')), MapStore(tmp_path)
    for i, m in zip(table.ids, f): store.save(i, Maps([1], m[:1].clamp(0, 1).numpy()))
    net = head_for(channel)
    p = decide_polarity(net, table, rule, store)
    assert (p.sign, p.agree, p.n, p.rule) == (1 - 2 * channel, 1., 6, rule) and p.margin * p.sign > .2
    assert net.polarity == p


def test_polarity_outvotes_an_odd_batch():
    "One batch of photos whose object fills the frame deceives the original, not the decision over all."
    f = blobs(12)
    f[8:] = f[8:, [1, 0]]               # the last four: objects at the border
    net = head_for(0)
    with torch.inference_mode(): last = net.head(f[8:])[2]
    assert check_positive_wsss(last, 1)                 # 'high P is background'
    p = decide_polarity(net, FeatureCache(f[:, None], range(12)))
    assert p.sign == 1 and p.agree == pytest.approx(8 / 12)


def test_polarity_is_minus_z():
    "−z is the complement of the sigmoid, 1−z is not (C-3); the map is refused before a decision."
    net, x = create_ccam(pretrained=False), torch.randn(2, 3, 64, 64)
    with pytest.raises(ValueError, match='has not been decided'): net.maps(x)
    up, down = Polarity(1, .1, 1., 'centre', 2), Polarity(-1, -.1, 1., 'centre', 2)
    net.polarity = up
    with torch.inference_mode():
        z = net.maps(x)
        a = ccam(net, x)
        net.polarity = down
        b = ccam(net, x)
        assert torch.equal(net.maps(x), -z)
    close(a + b, torch.ones_like(a))
    assert not torch.allclose(1 - z.sigmoid(), (1 - z).sigmoid(), atol=1e-2)


def test_cam_cue_is_a_correlation():
    p, m = np.random.default_rng(0).random((2, 6, 7)).astype(np.float32)
    close(cam_cue(torch.from_numpy(p)[None, None], [Maps([3], m[None])]), [np.corrcoef(p.ravel(), m.ravel())[0, 1]], 1e-5)
    flat = torch.full((1, 1, 6, 7), .5)
    assert cam_cue(flat, [Maps([3], m[None])]) == 0


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 12), st.integers(3, 12), st.integers(0, 99))
def test_centre_cue_changes_sign_with_the_map(h, w, seed):
    p = torch.rand(3, 1, h, w, generator=torch.Generator().manual_seed(seed))
    close(centre_cue(p), -centre_cue(1 - p))


# ---- maps

def test_maps_of_the_pets_system():
    "get_cam, gen_hr_cams and the masks at three thresholds; the flip that makes everything foreground (T5)."
    z = tensors('seed1_hrcam')
    net = CCAM(Stages(z['conv_weight'], 4), 5).eval()
    net.head.conv.weight.data = z['head_weight'].clone()
    gamma, beta, mean, var, eps = z['bn'].float()
    net.head.norm.weight.data[:], net.head.norm.bias.data[:], net.head.norm.running_mean[:], net.head.norm.running_var[:] = gamma, beta, mean, var
    net.head.norm.eps = float(z['bn'][4])
    for s in ('0.5', '1.0', '1.5', '2.0'): close(original_map(net, z['image'], float(s)), z[f'get_cam_s{s}'], 1e-4)
    hr = original_hr_map(net, z['image'])
    close(hr, z['hr_cam'], 1e-4), close(original_hr_map(net, z['image'], (1.,)), z['hr_cam_scale1'], 1e-4)
    for t in (.25, .5, .8): assert (((hr[0] > t) == z[f'pseudo_mask_t{t}']) | ((hr[0] - t).abs() < 1e-4)).all()
    net.head.norm.bias.data[:] = float(z['flip_bn_bias'])
    for s in ('0.5', '1.0', '1.5', '2.0'): close(original_map(net, z['image'], float(s)), z[f'flip_get_cam_s{s}'], 1e-4)
    flipped = original_hr_map(net, z['image'])
    assert flipped.min() > 1 and torch.allclose(flipped, z['flip_hr_cam'], atol=.1, rtol=1e-3)
    for sign in (1, -1):                    # ours stays a map, for either sign
        net.polarity = Polarity(sign, sign, 1., 'centre', 1)
        for form in ('relu', 'sigmoid'):
            m = ccam(net, z['image'], form=form)
            assert 0 <= m.min() and m.max() <= 1
        assert (m > .5).float().mean() not in (0, 1)


@pytest.mark.parametrize('form', ['relu', 'sigmoid'])
def test_a_mirrored_image_has_a_mirrored_map(form):
    torch.manual_seed(0)
    net = create_ccam(pretrained=False)
    net.polarity = Polarity(-1, -1., 1., 'centre', 1)
    x = torch.randn(2, 3, 64, 96)
    close(ccam(net, x, (1., .5), form=form).flip(3), ccam(net, x.flip(3), (1., .5), form=form), 1e-3)


def test_maps_keep_their_ids(view, cache, tmp_path):
    "Each image alone gives the map that the store has under its id (T6), whatever the order; a broken photo is listed."
    shutil.copytree(sample(profile='smoke')/'pets', tmp_path/'pets')
    own = pets(tmp_path/'pets', classes='breeds').view('tags', 'trainval')
    own[1].image.write_bytes(b'\xff\xd8 no')
    net = create_ccam(pretrained=False).eval()
    net.polarity = Polarity(1, 1., 1., 'centre', 1)
    store = MapStore(tmp_path/'maps')
    bad = write_ccams(net, own, store, size=64, scales=(1.,), bs=3)
    assert [i for i, _ in bad] == [own[1].id] and len(store) == len(own) - 1
    back = MapStore(tmp_path/'back')
    for o in reversed(list(own)): write_ccams(net, own.keep(lambda p, o=o: p.id == o.id), back, size=64, scales=(1.,))
    for i in store.ids(): assert np.allclose(store.load(i).values, back.load(i).values, atol=2e-3)
    assert len({store.load(i).values.tobytes() for i in store.ids()}) == len(store)


# ---- training

def test_no_tags_and_no_masks_are_read(view):
    bare = view.keep(lambda o: True)
    bare._items = [replace(o, tags=None, mask=None) for o in bare._items]
    for frozen in (True, False):
        learn = quietly(ccam_learner(bare, size=64, bs=4, pretrained=False, frozen=frozen))
        with learn.no_logging(): module.fit(learn, 1, learn.lr, wd=1e-4, schedule=PolySchedule(learn.lr))
        assert np.isfinite(learn.recorder.losses).all()
    with pytest.raises(ValueError, match='other images'): ccam_learner(view, size=64, pretrained=False, cache=FeatureCache(torch.rand(2, 1, 432, 4, 4), ['a', 'b']))


@pytest.mark.parametrize('frozen', [True, False])
def test_what_moves(view, frozen):
    "Frozen: only the head. Whole network: backbone and head; with the original's list no normalisation."
    for recipe in ('intended', 'original'):
        learn = quietly(ccam_learner(view, size=64, bs=4, pretrained=False, recipe=recipe, frozen=frozen))
        before = {k: v.clone() for k, v in learn.model.named_parameters()}
        with learn.no_logging(): module.fit(learn, 1, learn.lr, wd=1e-4, schedule=PolySchedule(learn.lr))
        moved = {k for k, v in learn.model.named_parameters() if not torch.equal(v, before[k])}
        assert 'head.conv.weight' in moved and ('head.norm.weight' in moved) == (recipe == 'intended')
        assert any(k.startswith('backbone') for k in moved) == (not frozen)
        assert learn.model.train().backbone.training == (not frozen) and learn.model.head.training
        if recipe == 'original': assert not any('bn' in k or 'norm' in k for k in moved)


def test_a_killed_run_goes_on(view, cache, tmp_path):
    class Stop(Callback):
        def after_batch(self):
            if self.epoch == 2 and self.iter == 0: raise KeyboardInterrupt
    def run(path=None, stop=False):
        learn = quietly(ccam_learner(view, size=64, bs=4, pretrained=False, cache=cache))
        if stop: learn.add_cb(Stop())
        with learn.no_logging():
            try: module.fit(learn, 4, learn.lr, wd=1e-4, path=path, schedule=PolySchedule(learn.lr))
            except KeyboardInterrupt: pass
        return learn.model.head.conv.weight
    whole = run()
    half = run(tmp_path/'c.pth', True)
    assert not torch.equal(half, whole) and torch.equal(run(tmp_path/'c.pth'), whole)


def test_cache_on_disk(view, tmp_path):
    "Written once, equal to memory, refused when cut, changed or another's; nothing is left of a failure."
    net = create_ccam(pretrained=False)
    a, b = cache_features(net, view, 64, path=tmp_path/'f'), cache_features(net, view, 64, path=tmp_path/'f')
    assert torch.equal(a.features, b.features) and a.ids == view.ids == b.ids
    assert torch.allclose(a.features, cache_features(net, view, 64).features, atol=1e-4)
    half = cache_features(net, view, 64, path=tmp_path/'half', dtype='float16')
    assert half.features.dtype == torch.float16 and half[0][0].dtype == torch.float32
    with pytest.raises(InputError, match='other images, settings or weights'): cache_features(net, view, 96, path=tmp_path/'f')
    with pytest.raises(InputError, match='other images, settings or weights'): cache_features(create_ccam(pretrained=False), view, 64, path=tmp_path/'f')
    (tmp_path/'f'/'features.npy').write_bytes(b'cut')
    with pytest.raises(InputError, match='not a readable table'): cache_features(net, view, 64, path=tmp_path/'f')
    broken = view.keep(lambda o: True)
    broken._items = [*broken._items[:2], replace(broken._items[2], image=tmp_path/'absent.jpg')]
    with pytest.raises(InputError, match='absent.jpg'): cache_features(net, broken, 64, bs=1, path=tmp_path/'g')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['f', 'half']


def test_class_specific(view, cache, tmp_path, capsys):
    "A head for each class on one backbone; by tag and by prediction; a class without a network is named."
    tags = sorted({t for o in view for t in o.tags})
    nets = train_class_ccams(view, epochs=1, size=64, bs=4, pretrained=False, cache=cache)
    assert sorted(nets) == tags and len({id(n.backbone) for n in nets.values()}) == 1
    for c, n in nets.items(): assert n.polarity.n == sum(c in o.tags for o in view)
    by_tag, by_guess = MapStore(tmp_path/'t'), MapStore(tmp_path/'g')
    assert write_ccams(nets, view, by_tag, size=64, scales=(1.,)) == []
    assert all(tuple(by_tag.load(o.id).keys) == o.tags for o in view)
    classifier = CamClassifier(create_backbone(pretrained=False), len(view.classes)).eval()
    with torch.no_grad(): classifier.head.bias[tags[0] - 1] = 1e3
    write_ccams(nets, view, by_guess, size=64, scales=(1.,), choice='predicted', classifier=classifier)
    assert all(by_guess.load(o.id).keys.tolist() == [tags[0]] for o in view)
    o = next(o for o in view if o.tags == (tags[0],))
    assert np.allclose(by_tag.load(o.id).values, by_guess.load(o.id).values, atol=2e-3)
    with pytest.raises(ValueError, match='needs a classifier'): write_ccams(nets, view, MapStore(tmp_path/'n'), size=64, choice='predicted')
    lacking = {c: n for c, n in nets.items() if c != tags[0]}
    with pytest.raises(ValueError, match=view.classes[tags[0] - 1]): write_ccams(lacking, view, MapStore(tmp_path/'n'), size=64, scales=(1.,))


# ---- files

def test_a_whole_network_for_each_class(view, tmp_path):
    "From a classifier's backbone, which stays as it was; each class has weights of its own, also after saving."
    start = CamClassifier(create_backbone(pretrained=False), 2).backbone
    before = [p.detach().clone() for p in start.parameters()]
    nets = train_class_ccams(view, classes=[1, 2], backbone=start, frozen=False, epochs=1, size=64, bs=4)
    assert all(a.equal(b) for a, b in zip(before, start.parameters()))
    weights = {c: next(m.weight for m in n.backbone.modules() if isinstance(m, nn.Conv2d)) for c, n in nets.items()}
    assert not weights[1].equal(before[0]) and not weights[1].equal(weights[2])
    save_ccam(nets, tmp_path, dict(backbone='tf_efficientnet_lite0', output_stride=16))
    again = load_ccam(tmp_path)
    x = torch.rand(1, 3, 64, 64)
    for c in nets: assert again[c].maps(x).equal(nets[c].eval().maps(x))
    assert again[1].backbone is not again[2].backbone


def test_saved_networks(view, cache, tmp_path):
    config, x = dict(backbone='tf_efficientnet_lite0', output_stride=16), torch.randn(1, 3, 64, 64)
    net = create_ccam(pretrained=False).eval()
    with pytest.raises(ValueError, match='has not been decided'): save_ccam(net, tmp_path, config)
    net.polarity = Polarity(-1, -.25, .9, 'centre', 12)
    save_ccam(net, tmp_path, config)
    assert json.loads((tmp_path/'ccam.json').read_text())['polarity'][''] == dict(sign=-1, margin=-.25, agree=.9, rule='centre', n=12)
    back = load_ccam(tmp_path)
    assert back.polarity == net.polarity and torch.equal(ccam(back, x), ccam(net, x))
    apart = {1: net, 2: create_ccam(pretrained=False).eval()}
    apart[2].polarity = Polarity(1, .5, 1., 'cam', 3)
    save_ccam(apart, tmp_path, config)
    back = load_ccam(tmp_path)
    assert sorted(back) == [1, 2] and all(torch.equal(ccam(back[c], x), ccam(apart[c], x)) for c in apart)
    note = json.loads((tmp_path/'ccam.json').read_text())
    for wrong in ({'polarity': {'1': {'sign': 5, 'margin': 0, 'agree': 1, 'rule': 'x', 'n': 1}}}, {'backbone': 'resnet18'}, {'output_stride': 'x'}):
        (tmp_path/'ccam.json').write_text(json.dumps(note | wrong))
        with pytest.raises(InputError, match='not a readable CCAM network'): load_ccam(tmp_path)


def test_backbone_without_stages_is_named():
    with pytest.raises(InputError, match='gives no features of its stages'): create_ccam(nn.Sequential(nn.Conv2d(3, 4, 1)))
