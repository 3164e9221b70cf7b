//! Statistics of samples: medians, quantiles, and the confidence interval of a ratio of two
//! medians.
use fastrand::Rng;
use serde::Serialize;

/// Number of bootstrap resamples for an interval.
const RESAMPLES: usize = 10_000;
/// Fixed seed: the same samples always give the same interval.
const SEED: u64 = 0x5eed;

/// A ratio of two medians with its 95 % interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Ratio {
    /// The ratio of the medians themselves.
    pub ratio: f64,
    /// Lower end of the interval.
    pub low: f64,
    /// Upper end of the interval.
    pub high: f64,
}

/// The middle sample, or the mean of the two middle ones; `None` without samples.
#[must_use]
pub fn median(samples: &[f64]) -> Option<f64> {
    quantile(samples, 0.5)
}

/// The value that `part` (0 to 1) of the samples do not exceed, interpolated linearly between the
/// two samples next to it; `None` without samples.
#[must_use]
pub fn quantile(samples: &[f64], part: f64) -> Option<f64> {
    let mut sorted = samples.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let position = sorted.len().checked_sub(1)? as f64 * part.clamp(0.0, 1.0);
    let (lower, upper) =
        (sorted.get(position.floor() as usize)?, sorted.get(position.ceil() as usize)?);
    Some((upper - lower).mul_add(position.fract(), *lower))
}

/// median(`above`) / median(`below`), with the 95 % percentile interval of a paired bootstrap.
///
/// Sample `i` of either comes from turn `i`. Whole turns are resampled, with replacement: a
/// disturbance during a turn has slowed both, and must not widen the interval.
///
/// `None` without samples, or if the two differ in number.
#[must_use]
pub fn ratio_of_medians(above: &[f64], below: &[f64]) -> Option<Ratio> {
    bootstrap(above, below, RESAMPLES)
}

fn bootstrap(above: &[f64], below: &[f64], resamples: usize) -> Option<Ratio> {
    if above.len() != below.len() {
        return None;
    }
    let ratio = median(above)? / median(below)?;
    let turns: Vec<(f64, f64)> = above.iter().copied().zip(below.iter().copied()).collect();
    let mut random = Rng::with_seed(SEED);
    let ratios: Option<Vec<f64>> = (0..resamples)
        .map(|_| {
            let drawn = turns.iter().filter_map(|_| random.choice(&turns).copied());
            let (above, below): (Vec<f64>, Vec<f64>) = drawn.unzip();
            Some(median(&above)? / median(&below)?)
        })
        .collect();
    let ratios = ratios?;
    Some(Ratio { ratio, low: quantile(&ratios, 0.025)?, high: quantile(&ratios, 0.975)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Around 100, with a tail to the right, as is usual for times.
    fn times(count: usize, seed: u64, factor: f64) -> Vec<f64> {
        let mut random = Rng::with_seed(seed);
        let time = |random: &mut Rng| 100.0 * factor * (1.0 + 0.1 * random.f64().powi(3));
        (0..count).map(|_| time(&mut random)).collect()
    }

    #[test]
    fn the_median_is_in_the_middle_whatever_the_order() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[7.0]), Some(7.0));
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 3.0, 2.0]), Some(2.5));
    }

    #[test]
    fn quantiles_reach_from_the_least_to_the_greatest() {
        let samples: Vec<f64> = (0..=100).rev().map(f64::from).collect();
        assert_eq!(quantile(&samples, 0.0), Some(0.0));
        assert_eq!(quantile(&samples, 0.95), Some(95.0));
        assert_eq!(quantile(&samples, 1.0), Some(100.0));
        assert_eq!(quantile(&[1.0, 2.0], 0.25), Some(1.25));
    }

    #[test]
    fn two_copies_of_one_program_differ_by_nothing() {
        let hits = (0..100)
            .filter(|&seed| {
                let (above, below) = (times(50, 2 * seed, 1.0), times(50, 2 * seed + 1, 1.0));
                let ratio = bootstrap(&above, &below, 200).unwrap();
                ratio.low <= 1.0 && 1.0 <= ratio.high
            })
            .count();
        // 95 are expected; percentile intervals of a median tend to be too wide.
        assert!((90..=100).contains(&hits), "1 lies in {hits} of 100 intervals");
    }

    #[test]
    fn a_true_difference_is_seen() {
        let ratio = ratio_of_medians(&times(200, 1, 1.05), &times(200, 2, 1.0)).unwrap();
        assert!(1.03 < ratio.low && ratio.low < 1.05, "{ratio:?}");
        assert!(1.05 < ratio.high && ratio.high < 1.07, "{ratio:?}");
        assert!(ratio.low <= ratio.ratio && ratio.ratio <= ratio.high);
    }

    #[test]
    fn what_slows_both_of_a_turn_does_not_count() {
        // The machine becomes slower and slower, up to three times the time; one is always slower
        // by 2 %.
        let drift: Vec<f64> = (0..100).map(|turn| 100.0 + 2.0 * f64::from(turn)).collect();
        let behind: Vec<f64> = drift.iter().map(|time| time * 1.02).collect();
        let ratio = ratio_of_medians(&behind, &drift).unwrap();
        assert!((ratio.low - 1.02).abs() < 1e-9 && (ratio.high - 1.02).abs() < 1e-9, "{ratio:?}");
    }

    #[test]
    fn the_same_samples_give_the_same_interval_and_unpaired_ones_none() {
        let (above, below) = (times(20, 1, 1.0), times(20, 2, 1.0));
        assert_eq!(ratio_of_medians(&above, &below), ratio_of_medians(&above, &below));
        assert_eq!(ratio_of_medians(&above, &below[1..]), None);
        assert_eq!(ratio_of_medians(&[], &[]), None);
    }
}
