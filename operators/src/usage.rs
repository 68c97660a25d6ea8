//! The differences that flow: usage, prices, spend.
//!
//! Linearity is the design. A usage row's difference is a vector (events, a count per meter,
//! explicit cost per category); a price is a vector; their product is the spend, so cost is a
//! bilinear join and every view a sum of differences. What is rare (cache writes, reasoning, audio,
//! pieces, explicit cost) stands behind one pointer that is null when all of it is zero: most rows
//! of most workloads need four counts.

use differential_dataflow::difference::{Abelian, IsZero, Monoid, Multiply, Semigroup};

use crate::event::{Event, METERS, Meter};
use crate::money::Atto;
use crate::price_book::Prices;

/// Meters that stand behind the pointer, in the order of [`UsageRest::meters`].
pub const RARE_METERS: [Meter; 7] = [
    Meter::CacheWrite,
    Meter::CacheWrite1h,
    Meter::Reasoning,
    Meter::AudioInput,
    Meter::AudioOutput,
    Meter::Images,
    Meter::Searches,
];

/// Usage of one or more events; a difference of the usage collection.
#[derive(
    Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, bincode::Encode, bincode::Decode,
)]
pub struct Usage {
    /// Events.
    pub events: i64,
    /// [`Meter::Input`].
    pub input: i64,
    /// [`Meter::CacheRead`].
    pub cache_read: i64,
    /// [`Meter::Output`].
    pub output: i64,
    /// The rest; `None` when it is all zero, never a box of zeros.
    pub rest: Option<Box<UsageRest>>,
}

/// The rarer part of [`Usage`].
#[derive(
    Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, bincode::Encode, bincode::Decode,
)]
pub struct UsageRest {
    /// Counts of [`RARE_METERS`].
    pub meters: [i64; 7],
    /// Explicit cost in atto-dollars: compute, storage, bandwidth, ai.
    pub explicit: [i128; 4],
}

impl Usage {
    /// The usage of one event that counts.
    pub fn of(event: &Event<'_>) -> Usage {
        let count = |meter: Meter| i64::from(event.meters[meter as usize]);
        let rest = UsageRest {
            meters: RARE_METERS.map(count),
            explicit: event.explicit.map_or([0; 4], |costs| costs.map(Atto::get)),
        };
        Usage {
            events: 1,
            input: count(Meter::Input),
            cache_read: count(Meter::CacheRead),
            output: count(Meter::Output),
            rest: (rest != UsageRest::default()).then(|| Box::new(rest)),
        }
    }

    /// The opposite difference.
    pub fn negated(mut self) -> Usage {
        self.negate();
        self
    }
}

impl IsZero for Usage {
    fn is_zero(&self) -> bool {
        (self.events | self.input | self.cache_read | self.output) == 0 && self.rest.is_none()
    }
}

impl Semigroup for Usage {
    fn plus_equals(&mut self, other: &Usage) {
        self.events += other.events;
        self.input += other.input;
        self.cache_read += other.cache_read;
        self.output += other.output;
        if let Some(more) = &other.rest {
            let rest = self.rest.get_or_insert_default();
            add(&mut rest.meters, &more.meters);
            add(&mut rest.explicit, &more.explicit);
            if **rest == UsageRest::default() {
                self.rest = None;
            }
        }
    }
}

fn add<T: std::ops::AddAssign + Copy, const N: usize>(to: &mut [T; N], from: &[T; N]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to += *from;
    }
}

impl Monoid for Usage {
    fn zero() -> Usage {
        Usage::default()
    }
}

impl Abelian for Usage {
    fn negate(&mut self) {
        self.events = -self.events;
        self.input = -self.input;
        self.cache_read = -self.cache_read;
        self.output = -self.output;
        if let Some(rest) = &mut self.rest {
            rest.meters = rest.meters.map(|n| -n);
            rest.explicit = rest.explicit.map(|n| -n);
        }
    }
}

/// Price of a rate at an instant, or the difference between two prices.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct PriceVector {
    /// 1 for a price, 0 for a difference of prices: whether the counts pass through.
    pub present: i64,
    /// Atto-dollars a token: input, cache read, output (fits `i64`: at most 1 USD a token).
    pub common: [i64; 3],
    /// Atto-dollars a unit of [`RARE_METERS`].
    pub rare: [i128; 7],
    /// 1 when a meter that the rate uses has no known price.
    pub unpriced: i64,
}

impl PriceVector {
    /// The price of usage that uses the meters of `uses` (bit `Meter as usize`). Reported usage
    /// joins the zero price: its cost came with it.
    pub fn of(prices: Option<&Prices>, uses: u16, reported: bool) -> PriceVector {
        let mut vector = PriceVector { present: 1, ..PriceVector::default() };
        if reported {
            return vector;
        }
        let known = |meter: Meter| prices.and_then(|p| p.per_unit[meter as usize]);
        let per_unit = |meter: Meter| known(meter).map_or(0, Atto::get);
        // A price beyond the book's bound of 1 USD a token never gets into a book.
        let per_token = |meter: Meter| i64::try_from(per_unit(meter)).unwrap_or(i64::MAX);
        vector.common = [Meter::Input, Meter::CacheRead, Meter::Output].map(per_token);
        vector.rare = RARE_METERS.map(per_unit);
        let lacking = crate::event::ALL_METERS
            .into_iter()
            .any(|meter| uses & (1 << meter as usize) != 0 && known(meter).is_none());
        vector.unpriced = i64::from(lacking);
        vector
    }

    /// What must be added to `old` to get `self`.
    pub fn minus(&self, old: &PriceVector) -> PriceVector {
        let mut delta = self.clone();
        delta.present -= old.present;
        delta.unpriced -= old.unpriced;
        for (new, old) in delta.common.iter_mut().zip(old.common) {
            *new -= old;
        }
        for (new, old) in delta.rare.iter_mut().zip(old.rare) {
            *new -= old;
        }
        delta
    }
}

/// Spend: counts with their cost. A value of the views, and the difference that changes it.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Spend {
    /// Events.
    pub events: i64,
    /// [`Meter::Input`].
    pub input: i64,
    /// [`Meter::CacheRead`].
    pub cache_read: i64,
    /// [`Meter::Output`].
    pub output: i64,
    /// Cost of the priced part, explicit cost included.
    pub cost: Atto,
    /// The rest; `None` when it is all zero.
    pub rest: Option<Box<SpendRest>>,
}

/// The rarer part of [`Spend`].
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct SpendRest {
    /// Counts of [`RARE_METERS`].
    pub meters: [i64; 7],
    /// The parts of the cost that are not AI: compute, storage, bandwidth.
    pub other_costs: [Atto; 3],
    /// Events with a meter that has no known price.
    pub unpriced: i64,
}

impl Spend {
    /// Events with a meter that has no known price.
    pub fn unpriced(&self) -> i64 {
        self.rest.as_ref().map_or(0, |rest| rest.unpriced)
    }

    /// Count of one meter.
    pub fn meter(&self, meter: Meter) -> i64 {
        match meter {
            Meter::Input => self.input,
            Meter::CacheRead => self.cache_read,
            Meter::Output => self.output,
            rare => {
                let at = RARE_METERS.iter().position(|m| *m == rare);
                at.zip(self.rest.as_ref()).map_or(0, |(at, rest)| rest.meters[at])
            }
        }
    }

    /// All counts, indexed by meter.
    pub fn meters(&self) -> [i64; METERS] {
        crate::event::ALL_METERS.map(|meter| self.meter(meter))
    }

    /// Whether the whole is nothing.
    pub fn is_nothing(&self) -> bool {
        (self.events | self.input | self.cache_read | self.output) == 0
            && self.cost == Atto::ZERO
            && self.rest.is_none()
    }

    /// Whether nothing in it is priced, so that its cost is unknown rather than zero.
    pub fn cost_unknown(&self) -> bool {
        self.cost == Atto::ZERO && self.events > 0 && self.unpriced() == self.events
    }

    /// Adds a difference.
    #[inline]
    pub fn add(&mut self, other: &Spend) {
        self.events += other.events;
        self.input += other.input;
        self.cache_read += other.cache_read;
        self.output += other.output;
        self.cost += other.cost;
        if let Some(more) = &other.rest {
            let rest = self.rest.get_or_insert_default();
            add(&mut rest.meters, &more.meters);
            add(&mut rest.other_costs, &more.other_costs);
            rest.unpriced += more.unpriced;
            if **rest == SpendRest::default() {
                self.rest = None;
            }
        }
    }

    /// The opposite difference.
    pub fn negated(mut self) -> Spend {
        self.events = -self.events;
        self.input = -self.input;
        self.cache_read = -self.cache_read;
        self.output = -self.output;
        self.cost = -self.cost;
        if let Some(rest) = &mut self.rest {
            rest.meters = rest.meters.map(|n| -n);
            rest.other_costs = rest.other_costs.map(|c| -c);
            rest.unpriced = -rest.unpriced;
        }
        self
    }
}

impl Multiply<PriceVector> for &Usage {
    type Output = Spend;

    #[inline]
    fn multiply(self, price: &PriceVector) -> Spend {
        let n = price.present;
        let wide = |count: i64, price: i64| i128::from(count) * i128::from(price);
        let mut cost = wide(self.input, price.common[0])
            + wide(self.cache_read, price.common[1])
            + wide(self.output, price.common[2]);
        let mut rest = None;
        if self.rest.is_some() || price.unpriced != 0 {
            let mut more =
                SpendRest { unpriced: self.events * price.unpriced, ..SpendRest::default() };
            if let Some(usage) = &self.rest {
                for (at, count) in usage.meters.iter().enumerate() {
                    cost += i128::from(*count) * price.rare[at];
                    more.meters[at] = count * n;
                }
                for (at, explicit) in usage.explicit.iter().enumerate() {
                    cost += explicit * i128::from(n);
                    if at < 3 {
                        more.other_costs[at] = Atto::new(explicit * i128::from(n));
                    }
                }
            }
            rest = (more != SpendRest::default()).then(|| Box::new(more));
        }
        Spend {
            events: self.events * n,
            input: self.input * n,
            cache_read: self.cache_read * n,
            output: self.output * n,
            cost: Atto::new(cost),
            rest,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn common_rows_stay_small() {
        assert_eq!(size_of::<Usage>(), 40);
        assert_eq!(size_of::<Spend>(), 56);
    }

    #[test]
    fn the_product_is_linear_in_the_price() {
        let mut rest = UsageRest::default();
        rest.meters[2] = 7;
        rest.explicit[0] = 11;
        let usage =
            Usage { events: 2, input: 10, cache_read: 4, output: 3, rest: Some(Box::new(rest)) };
        let old = PriceVector { present: 1, common: [5, 1, 9], rare: [3; 7], unpriced: 1 };
        let new = PriceVector { present: 1, common: [4, 2, 8], rare: [1; 7], unpriced: 0 };
        let mut spend = (&usage).multiply(&old);
        spend.add(&(&usage).multiply(&new.minus(&old)));
        assert_eq!(spend, (&usage).multiply(&new));
        assert_eq!(spend.cost, Atto::new(40 + 8 + 24 + 7 + 11));
    }

    #[test]
    fn a_difference_and_its_opposite_leave_nothing() {
        let rest = UsageRest { meters: [1; 7], explicit: [1; 4] };
        let usage =
            Usage { events: 1, input: 1, cache_read: 1, output: 1, rest: Some(Box::new(rest)) };
        let mut sum = usage.clone();
        sum.plus_equals(&usage.negated());
        assert!(sum.is_zero());
        let price = PriceVector { present: 1, common: [1; 3], rare: [1; 7], unpriced: 1 };
        let spend = (&Usage { events: 1, ..Usage::default() }).multiply(&price);
        let mut sum = spend.clone();
        sum.add(&spend.negated());
        assert!(sum.is_nothing());
    }
}
