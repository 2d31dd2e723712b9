//! Medians, quartiles and ratios of the figures of several rounds.

/// A figure that a quarter, a half and three quarters of the rounds do not exceed.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Quartiles {
    pub(crate) lower: f64,
    pub(crate) median: f64,
    pub(crate) upper: f64,
}

impl Quartiles {
    /// Between two rounds they are interpolated. There are none without a round.
    pub(crate) fn of(figures: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut sorted: Vec<_> = figures.into_iter().collect();
        sorted.sort_by(f64::total_cmp);
        let at = |part: f64| {
            let position = part * (sorted.len() - 1) as f64;
            let (below, above) = (sorted[position.floor() as usize], sorted[position.ceil() as usize]);
            below + (above - below) * position.fract()
        };
        (!sorted.is_empty()).then(|| Self { lower: at(0.25), median: at(0.5), upper: at(0.75) })
    }
}

/// The median of what the first is of the second, round by round.
///
/// Both ran in the same minute of each round, so what else the machine did then counts little. A round without one of
/// them does not count.
pub(crate) fn paired_ratio(first: &[Option<f64>], second: &[Option<f64>]) -> Option<f64> {
    let ratios = first.iter().zip(second).filter_map(|(first, second)| Some((*first)? / (*second)?));
    Quartiles::of(ratios.filter(|ratio| ratio.is_finite())).map(|ratios| ratios.median)
}

/// A rounded number, its thousands apart.
pub(crate) fn grouped(number: f64) -> String {
    let digits = format!("{number:.0}");
    let mut text = String::new();
    for (position, digit) in digits.chars().enumerate() {
        if position > 0 && (digits.len() - position).is_multiple_of(3) {
            text.push(' ');
        }
        text.push(digit);
    }
    text
}

/// A number with so many digits after the point that two or three of all are there.
pub(crate) fn short(number: f64) -> String {
    match number {
        small if small < 0.995 => format!("{small:.2}"),
        small if small < 9.95 => format!("{small:.1}"),
        large => grouped(large),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quartiles<const N: usize>(figures: [f64; N]) -> Option<(f64, f64, f64)> {
        Quartiles::of(figures).map(|it| (it.lower, it.median, it.upper))
    }

    #[test]
    fn quartiles_lie_on_a_round_or_between_two() {
        assert_eq!(quartiles([]), None);
        assert_eq!(quartiles([7.0]), Some((7.0, 7.0, 7.0)));
        assert_eq!(quartiles([5.0, 1.0, 3.0, 2.0, 4.0]), Some((2.0, 3.0, 4.0)));
        assert_eq!(quartiles([40.0, 10.0, 20.0, 30.0]), Some((17.5, 25.0, 32.5)));
    }

    #[test]
    fn one_disturbed_round_moves_none_of_them_far() {
        let calm = quartiles([100.0, 101.0, 102.0, 103.0, 104.0, 105.0, 106.0]);
        assert_eq!(calm, Some((101.5, 103.0, 104.5)));
        assert_eq!(quartiles([3.0, 101.0, 102.0, 103.0, 104.0, 105.0, 106.0]), calm);
    }

    #[test]
    fn a_ratio_is_that_of_the_same_round() {
        // The machine became ten times as slow after the first round: the ratio stays what it was.
        assert_eq!(
            paired_ratio(&[Some(200.0), Some(20.0), Some(22.0)], &[Some(100.0), Some(10.0), Some(10.0)]),
            Some(2.0)
        );
        assert_eq!(paired_ratio(&[Some(200.0), None, Some(30.0)], &[Some(100.0), Some(1.0), Some(10.0)]), Some(2.5));
        assert_eq!(paired_ratio(&[Some(200.0), Some(30.0)], &[Some(0.0), Some(10.0)]), Some(3.0));
        assert_eq!(paired_ratio(&[Some(200.0)], &[None]), None);
    }

    #[test]
    fn thousands_stand_apart() {
        assert_eq!(grouped(12.4), "12");
        assert_eq!(grouped(999.6), "1 000");
        assert_eq!(grouped(1_234_567.0), "1 234 567");
    }

    #[test]
    fn small_numbers_keep_their_digits() {
        assert_eq!([0.714, 0.996, 5.04, 9.96, 1234.5].map(short), ["0.71", "1.0", "5.0", "10", "1 234"]);
    }
}
