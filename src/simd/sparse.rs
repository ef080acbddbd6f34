//! What rows need of which few elements keep a weight: picking them out, and powers.

use super::functions::{LANES, exp1, ln1, sum_of, tree};
use super::per_level;

/// `max(x, 0)^r`; NaN stays NaN.
#[inline(always)]
fn power(x: f32, r: f32) -> f32 {
    let y = exp1(r * ln1(x));
    if x < f32::MIN_POSITIVE {
        0.0
    } else if x.is_nan() {
        x
    } else {
        y
    }
}

/// The same for `r = N / 2`, by products and at most one root.
#[inline(always)]
fn half_power<const N: usize>(x: f32) -> f32 {
    let mut y = if N % 2 == 1 { (if x < 0.0 { 0.0 } else { x }).sqrt() } else { 1.0 };
    for _ in 0..N / 2 {
        y *= x;
    }
    if x <= 0.0 { 0.0 } else { y }
}

/// The body of [`powers`] for one power.
macro_rules! powers_by {
    ($x:ident, $factor:ident, $shift:ident, $power:expr) => {{
        for x in $x.iter_mut() {
            *x = $power($factor * *x + $shift);
        }
        sum_of($x, |x| x)
    }};
}

/// The body of [`power_sums`] for one power: that of the second sum.
macro_rules! power_sums_by {
    ($x:ident, $tau:ident, $power:expr) => {{
        let mut lanes = [[0.0f32; LANES]; 2];
        let (whole, rest) = $x.as_chunks::<LANES>();
        // What is missing of the last part has no weight.
        let mut last = [$tau; LANES];
        last[..rest.len()].copy_from_slice(rest);
        for x in whole.iter().chain([&last]) {
            for i in 0..LANES {
                let u = x[i] - $tau;
                let y = $power(u);
                lanes[0][i] += y * u;
                lanes[1][i] += y;
            }
        }
        lanes.map(tree)
    }};
}

per_level! {
    /// `x = max(factor x + shift, 0)^r`; returns the sum.
    pub fn powers(x: &mut [f32], factor: f32, shift: f32, r: f32) -> f32 {
        match 2.0 * r {
            2.0 => powers_by!(x, factor, shift, half_power::<2>),
            3.0 => powers_by!(x, factor, shift, half_power::<3>),
            4.0 => powers_by!(x, factor, shift, half_power::<4>),
            6.0 => powers_by!(x, factor, shift, half_power::<6>),
            8.0 => powers_by!(x, factor, shift, half_power::<8>),
            _ => powers_by!(x, factor, shift, |x| power(x, r)),
        }
    }
}

per_level! {
    /// The sums of `max(x - tau, 0)^r` and of `max(x - tau, 0)^(r - 1)`.
    pub fn power_sums(x: &[f32], tau: f32, r: f32) -> [f32; 2] {
        match 2.0 * r {
            2.0 => power_sums_by!(x, tau, half_power::<0>),
            4.0 => power_sums_by!(x, tau, half_power::<2>),
            6.0 => power_sums_by!(x, tau, half_power::<4>),
            8.0 => power_sums_by!(x, tau, half_power::<6>),
            _ => power_sums_by!(x, tau, |x| power(x, r - 1.0)),
        }
    }
}

per_level! {
    /// Fills `to` with the elements from `least` to `most`, in their order.
    pub fn gather(x: &[f32], least: f32, most: f32, to: &mut Vec<f32>) {
        to.clear();
        to.resize(x.len(), 0.0);
        let mut n = 0;
        let (whole, rest) = x.as_chunks::<LANES>();
        for x in whole {
            let mut any = 0;
            for x in x {
                any |= u32::from(*x >= least) & u32::from(*x <= most);
            }
            if any == 0 {
                continue;
            }
            // Without a branch for each element, which nothing could foresee.
            for x in x {
                to[n] = *x;
                n += usize::from((*x >= least) & (*x <= most));
            }
        }
        for x in rest {
            to[n] = *x;
            n += usize::from((*x >= least) & (*x <= most));
        }
        to.truncate(n);
    }
}

/// Groups of [`least_of_largest`].
pub const GROUPS: usize = 64;

per_level! {
    /// The least of the largest of [`GROUPS`] groups, so that at least as many elements are no less.
    /// NaN is skipped; -inf if a group has no elements.
    pub fn least_of_largest(x: &[f32]) -> f32 {
        let mut largest = [f32::NEG_INFINITY; GROUPS];
        let (whole, rest) = x.as_chunks::<GROUPS>();
        for x in whole {
            for i in 0..GROUPS {
                largest[i] = if x[i] > largest[i] { x[i] } else { largest[i] };
            }
        }
        for (largest, x) in largest.iter_mut().zip(rest) {
            *largest = if *x > *largest { *x } else { *largest };
        }
        largest.into_iter().fold(f32::INFINITY, f32::min)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn powers_are_accurate() {
        assert_eq!((power(-1.0, 2.5), power(0.0, 3.0), power(1.0, 7.0)), (0.0, 0.0, 1.0));
        assert_eq!(
            (half_power::<3>(-1.0), half_power::<4>(0.0), half_power::<0>(2.0)),
            (0.0, 0.0, 1.0)
        );
        assert_eq!(
            (half_power::<3>(4.0), half_power::<8>(3.0), half_power::<2>(5.0)),
            (8.0, 81.0, 5.0)
        );
        assert!(half_power::<2>(f32::NAN).is_nan() && half_power::<5>(f32::NAN).is_nan());
        assert!((power(0.7, 3.0) - 0.343).abs() < 1e-6 && power(f32::NAN, 2.0).is_nan());
    }

    #[test]
    fn gathers_and_counts_like_the_plain_way() {
        for n in [0, 1, 15, 16, 17, 64, 100, 1000] {
            let x: Vec<f32> = (0..n).map(|i| (i * 7919 % 1009) as f32 - 300.0).collect();
            for (least, most) in [(0.0, 400.0), (-1e9, 1e9), (650.0, f32::INFINITY), (5.0, 4.0)] {
                let mut found = vec![7.0];
                gather(&x, least, most, &mut found);
                let plain = x.iter().copied().filter(|x| (least..=most).contains(x));
                assert!(plain.eq(found), "{n} from {least} to {most}");
            }
            let least = least_of_largest(&x);
            assert!(n < GROUPS || x.iter().filter(|x| **x >= least).count() >= GROUPS, "{n}");
            assert_eq!(least == f32::NEG_INFINITY, n < GROUPS, "{n}");
        }
    }
}
