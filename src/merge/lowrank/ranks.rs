//! How many elements each head keeps: parts of heads are kept in the order of what they carry.

use crate::bad_usage;
use crate::error::Result;

/// What can be kept of a head or not.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Part {
    /// Elements.
    pub(super) dims: usize,
    /// Squares of logits or outputs that are lost without it.
    pub(super) energy: f64,
}

/// The parts of one head. What they carry counts in relation to all of the layer.
pub(super) struct Parts {
    pub(super) layer: usize,
    pub(super) parts: Vec<Part>,
}

/// How much is kept.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Target {
    /// So many elements of each head.
    Rank(usize),
    /// A share of all elements of all heads.
    Ratio(f64),
    /// Of each head, as few as carry this share.
    Energy(f64),
}

/// Share of a head's elements that is kept whatever they carry.
const LEAST: f64 = 0.125;

impl Parts {
    fn width(&self) -> usize {
        self.parts.iter().map(|p| p.dims).sum()
    }

    fn energy(&self) -> f64 {
        self.parts.iter().map(|p| p.energy).sum()
    }

    /// Indices of the parts, those that carry most for an element first.
    fn order(&self) -> Vec<usize> {
        let density = |i: &usize| self.parts[*i].energy / self.parts[*i].dims as f64;
        let mut order: Vec<usize> = (0..self.parts.len()).collect();
        order.sort_by(|a, b| density(b).total_cmp(&density(a)));
        order
    }
}

/// Which parts of each head are kept, by their indices, ascending; at least one.
pub(super) fn choose(what: &str, heads: &[Parts], target: Target) -> Result<Vec<Vec<usize>>> {
    let mut kept: Vec<Vec<usize>> = match target {
        Target::Rank(rank) => {
            if let Some(head) = heads.iter().find(|h| h.width() < rank) {
                let width = head.width();
                bad_usage!(
                    "form lowrank: {what} = {rank}; heads of layer {} have {width}",
                    head.layer
                );
            }
            let cut = heads.iter().filter(|h| h.width() > rank).flat_map(|h| &h.parts);
            if let Some(unit) = cut.map(|p| p.dims).find(|unit| !rank.is_multiple_of(*unit)) {
                bad_usage!("form lowrank: {what} = {rank}; allowed are multiples of {unit}");
            }
            heads.iter().map(|h| first(h, |dims, _| dims <= rank)).collect()
        }
        Target::Energy(share) => {
            let enough = |h: &Parts| {
                let wanted = share * h.energy();
                let mut before = 0.0;
                first(h, |_, energy| std::mem::replace(&mut before, energy) < wanted)
            };
            heads.iter().map(enough).collect()
        }
        Target::Ratio(ratio) => pooled(heads, ratio),
    };
    kept.iter_mut().for_each(|kept| kept.sort_unstable());
    Ok(kept)
}

/// The same parts of all heads, by what they carry in all layers.
pub(super) fn shared(heads: &[Parts], target: Target) -> Result<Vec<Vec<usize>>> {
    let mut all = Parts { layer: 0, parts: heads.first().map_or(Vec::new(), |h| h.parts.clone()) };
    all.parts.iter_mut().for_each(|part| part.energy = 0.0);
    if heads.iter().any(|h| h.parts.len() != all.parts.len()) {
        bad_usage!("form lowrank: shared=yes needs heads of one width");
    }
    for head in heads {
        let energy = head.energy().max(f64::MIN_POSITIVE);
        let pairs = all.parts.iter_mut().zip(&head.parts);
        pairs.for_each(|(sum, part)| sum.energy += part.energy / energy);
    }
    let kept = choose("qk", std::slice::from_ref(&all), target)?;
    Ok(vec![kept.into_iter().next().unwrap_or_default(); heads.len()])
}

/// The first parts in order as long as `more` says so of the elements and the energy with the next.
fn first(head: &Parts, mut more: impl FnMut(usize, f64) -> bool) -> Vec<usize> {
    let (mut dims, mut energy) = (0, 0.0);
    let mut kept = Vec::new();
    for i in head.order() {
        let part = head.parts[i];
        (dims, energy) = (dims + part.dims, energy + part.energy);
        if !kept.is_empty() && !more(dims, energy) {
            break;
        }
        kept.push(i);
    }
    kept
}

/// Parts of all heads together, in the order of the share of their layer's energy that they carry.
fn pooled(heads: &[Parts], ratio: f64) -> Vec<Vec<usize>> {
    let total: usize = heads.iter().map(Parts::width).sum();
    let budget = (ratio * total as f64).round() as usize;
    let least = |h: &Parts| (h.width() as f64 * LEAST.min(ratio)).ceil() as usize;
    let mut kept: Vec<Vec<usize>> =
        heads.iter().map(|h| first(h, |dims, _| dims <= least(h))).collect();
    let mut dims: usize =
        heads.iter().zip(&kept).flat_map(|(h, k)| k.iter().map(|i| h.parts[*i].dims)).sum();
    let layer_energy = |layer: usize| -> f64 {
        heads.iter().filter(|h| h.layer == layer).map(Parts::energy).sum()
    };
    let mut rest = Vec::new();
    for (h, head) in heads.iter().enumerate() {
        let energy = layer_energy(head.layer).max(f64::MIN_POSITIVE);
        let left = (0..head.parts.len()).filter(|i| !kept[h].contains(i));
        rest.extend(left.map(|i| {
            let part = head.parts[i];
            (part.energy / energy / part.dims as f64, h, i)
        }));
    }
    rest.sort_by(|a, b| b.0.total_cmp(&a.0));
    for (_, h, i) in rest {
        if dims + heads[h].parts[i].dims <= budget {
            dims += heads[h].parts[i].dims;
            kept[h].push(i);
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heads() -> Vec<Parts> {
        let head = |layer: usize, scale: f64| Parts {
            layer,
            parts: (0..16)
                .map(|i| Part { dims: 2, energy: scale * 0.7f64.powi(i * (1 + layer as i32)) })
                .collect(),
        };
        vec![head(0, 1.0), head(0, 3.0), head(1, 50.0), head(1, 1.0)]
    }

    fn dims(heads: &[Parts], kept: &[Vec<usize>]) -> Vec<usize> {
        heads.iter().zip(kept).map(|(h, k)| k.iter().map(|i| h.parts[*i].dims).sum()).collect()
    }

    #[test]
    fn ratios_are_kept() {
        let heads = heads();
        let mut before = vec![0; 4];
        for ratio in [0.25, 0.5, 0.75, 1.0] {
            let kept = choose("qk", &heads, Target::Ratio(ratio)).unwrap();
            let dims = dims(&heads, &kept);
            assert_eq!(dims.iter().sum::<usize>(), (ratio * 128.0) as usize);
            assert!(dims.iter().all(|n| (4..=32).contains(n)), "{dims:?}");
            assert!(dims.iter().zip(&before).all(|(a, b)| a >= b), "{dims:?} {before:?}");
            before = dims;
        }
        // What falls off slower gets more.
        let kept = choose("qk", &heads, Target::Ratio(0.5)).unwrap();
        assert!(kept[1].len() > kept[2].len());
    }

    #[test]
    fn ranks_and_energies_are_of_each_head() {
        let heads = heads();
        let kept = choose("qk", &heads, Target::Rank(10)).unwrap();
        assert!(kept.iter().all(|k| k == &[0, 1, 2, 3, 4]));
        for (rank, message) in [(34, "heads of layer 0 have 32"), (9, "multiples of 2")] {
            let error = choose("qk", &heads, Target::Rank(rank)).unwrap_err();
            assert!(error.to_string().contains(message), "{error}");
        }
        for (head, kept) in heads.iter().zip(choose("qk", &heads, Target::Energy(0.9)).unwrap()) {
            let energy = |n: usize| kept[..n].iter().map(|i| head.parts[*i].energy).sum::<f64>();
            assert!(energy(kept.len()) >= 0.9 * head.energy());
            assert!(energy(kept.len() - 1) < 0.9 * head.energy());
        }
        let all = choose("qk", &heads, Target::Energy(1.0)).unwrap();
        assert!(all.iter().all(|k| k.len() == 16));
    }
}
