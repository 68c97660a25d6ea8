//! One entry of a price book as written, and the rules it must keep.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::event::{CONTEXT_BOUNDS, METERS, Meter, Tier, excerpt, name_valid};
use crate::ids::org_valid;
use crate::money::{Atto, MoneyError};
use crate::time::{SLOT, Time};

/// Highest price of one token.
pub const TOKEN_PRICE_MAX: Atto = Atto::usd(1);
/// Highest price of one image or search.
pub const PIECE_PRICE_MAX: Atto = Atto::usd(10_000);

/// Name of the price field of each meter, in the order of [`Meter`].
pub const PRICE_FIELDS: [&str; METERS] = [
    "input",
    "cached_input",
    "cache_write",
    "cache_write_1h",
    "output",
    "reasoning",
    "audio_input",
    "audio_output",
    "image",
    "search",
];

/// Power of ten of the units a token price is written for: a million.
const MILLION: u32 = 6;

/// The price of one unit, exact to the atto-dollar. Compares by amount alone.
#[derive(Clone, Copy)]
pub struct Price {
    per_unit: Atto,
    rounded: bool,
}

impl Price {
    /// The price of one unit in atto-dollars.
    pub const fn new(per_unit: Atto) -> Price {
        Price { per_unit, rounded: false }
    }

    /// Reads USD per piece or per single token, such as `2.5e-06`.
    ///
    /// # Errors
    /// When the text is no decimal number, or far out of range.
    pub fn per_unit(text: &str) -> Result<Price, MoneyError> {
        Atto::parse(text).map(|(per_unit, rounded)| Price { per_unit, rounded })
    }

    /// Reads USD per million tokens, such as `2.50`.
    ///
    /// # Errors
    /// When the text is no decimal number, or far out of range.
    pub fn per_million(text: &str) -> Result<Price, MoneyError> {
        Atto::parse_per(text, MILLION).map(|(per_unit, rounded)| Price { per_unit, rounded })
    }

    /// The price of one unit.
    pub const fn get(self) -> Atto {
        self.per_unit
    }

    /// Whether the text it was read from had more than eighteen decimals a unit.
    pub const fn rounded(self) -> bool {
        self.rounded
    }

    /// USD per million units, as a plain decimal.
    pub fn to_per_million(self) -> String {
        // By digits, since a price still to be checked may be too large to multiply.
        let text = self.per_unit.to_string();
        let (sign, text) = match text.strip_prefix('-') {
            Some(rest) => ("-", rest),
            None => ("", text.as_str()),
        };
        let (whole, decimals) = text.split_once('.').unwrap_or((text, ""));
        let shift = MILLION as usize;
        let digits = format!("{whole}{decimals:0<shift$}");
        let (whole, decimals) = digits.split_at(whole.len() + shift);
        let whole = whole.trim_start_matches('0');
        let whole = if whole.is_empty() { "0" } else { whole };
        if decimals.is_empty() {
            format!("{sign}{whole}")
        } else {
            format!("{sign}{whole}.{decimals}")
        }
    }
}

impl PartialEq for Price {
    fn eq(&self, other: &Price) -> bool {
        self.per_unit == other.per_unit
    }
}

impl Eq for Price {}

impl fmt::Debug for Price {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} a unit", self.per_unit)
    }
}

/// One entry of a price book, as written in a file or a request: prices in USD per million tokens
/// (`image` and `search`: per piece) as decimal strings. See [`crate::price_book`] for what it means.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PriceEntry {
    /// Provider, as events name it.
    pub provider: String,
    /// Model, as events name it.
    pub model: String,
    /// Start of a slot from which the entry holds; left out: from the beginning.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub effective_from: Option<Time>,
    /// Fresh text input.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "per_million")]
    pub input: Option<Price>,
    /// Input read from a cache.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "per_million")]
    pub cached_input: Option<Price>,
    /// Input written to the short cache.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "per_million")]
    pub cache_write: Option<Price>,
    /// Input written to the one-hour cache.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "per_million")]
    pub cache_write_1h: Option<Price>,
    /// Text output.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "per_million")]
    pub output: Option<Price>,
    /// Reasoning output.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "per_million")]
    pub reasoning: Option<Price>,
    /// Audio input.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "per_million")]
    pub audio_input: Option<Price>,
    /// Audio output.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "per_million")]
    pub audio_output: Option<Price>,
    /// One image.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "per_piece")]
    pub image: Option<Price>,
    /// One search.
    #[serde(default, skip_serializing_if = "Option::is_none", with = "per_piece")]
    pub search: Option<Price>,
    /// Service tier.
    #[serde(default, skip_serializing_if = "is_standard")]
    pub tier: Tier,
    /// Lower bound of the first context class the entry is for: one of [`CONTEXT_BOUNDS`].
    #[serde(default, skip_serializing_if = "is_zero")]
    pub min_input_tokens: u64,
    /// The org the entry is for; left out: every org without an override.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub org: Option<String>,
}

/// A list of entries: the form of a price book file (TOML) and of the body of a price change (JSON).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PriceList {
    /// The entries.
    pub prices: Vec<PriceEntry>,
}

fn is_standard(tier: &Tier) -> bool {
    *tier == Tier::Standard
}

fn is_zero(n: &u64) -> bool {
    *n == 0
}

impl PriceEntry {
    /// The prices as written, without fall-backs, in the order of [`Meter`].
    pub fn written(&self) -> [Option<Price>; METERS] {
        [
            self.input,
            self.cached_input,
            self.cache_write,
            self.cache_write_1h,
            self.output,
            self.reasoning,
            self.audio_input,
            self.audio_output,
            self.image,
            self.search,
        ]
    }

    /// Names of the fields whose price was rounded when it was read.
    pub fn rounded(&self) -> Vec<&'static str> {
        let fields = PRICE_FIELDS.into_iter().zip(self.written());
        fields
            .filter(|(_, price)| price.is_some_and(Price::rounded))
            .map(|(name, _)| name)
            .collect()
    }

    /// Whether it has no price at all, and thus ends the entry before it.
    pub fn withdraws(&self) -> bool {
        self.written().iter().all(Option::is_none)
    }

    fn check(&self, mut wrong: impl FnMut(&'static str, String)) {
        for (field, name) in [("provider", &self.provider), ("model", &self.model)] {
            if let Err(rejection) = name_valid(field, name) {
                wrong(field, rejection.detail);
            }
        }
        if let Some(org) = self.org.as_deref().filter(|org| !org_valid(org)) {
            let rule = "must be 1 to 128 characters of A-Z, a-z, 0-9, '_' and '-'";
            wrong("org", format!("org {:?} {rule}", excerpt(org)));
        }
        if let Some(from) = self.effective_from {
            if from < Time::MIN || from >= Time::MAX {
                let rule = "must lie between 1970-01-01 and 2200-01-01";
                wrong("effective_from", format!("effective_from {from} {rule}"));
            } else if from.0 % SLOT != 0 {
                let before = Time(from.0 - from.0 % SLOT);
                let after = Time(before.0 + SLOT);
                let rule = "lies inside a slot of 15 minutes; the nearest boundaries are";
                let detail = format!("effective_from {from} {rule} {before} and {after}");
                wrong("effective_from", detail);
            }
        }
        if !CONTEXT_BOUNDS.contains(&self.min_input_tokens) {
            let bounds: Vec<String> = CONTEXT_BOUNDS.iter().map(u64::to_string).collect();
            let detail = format!(
                "min_input_tokens {} must be one of {}",
                self.min_input_tokens,
                bounds.join(", ")
            );
            wrong("min_input_tokens", detail);
        }
        for (meter, price) in self.written().into_iter().enumerate() {
            let Some(price) = price else { continue };
            let field = PRICE_FIELDS[meter];
            let token = meter < Meter::Images as usize;
            let max = if token { TOKEN_PRICE_MAX } else { PIECE_PRICE_MAX };
            if price.get() >= Atto::ZERO && price.get() <= max {
                continue;
            }
            let detail = if token {
                let (price, max) = (price.to_per_million(), Price::new(max).to_per_million());
                format!("{field} is {price} USD per million tokens; it must be between 0 and {max}")
            } else {
                format!("{field} is {} USD a piece; it must be between 0 and {max}", price.get())
            };
            wrong(field, detail);
        }
    }

    /// What the entry is about: key and start.
    pub(super) fn place(&self) -> (&str, &str, Option<&str>, Tier, u64, Time) {
        let from = self.effective_from.unwrap_or(Time::MIN);
        let bound = self.min_input_tokens;
        (&self.provider, &self.model, self.org.as_deref(), self.tier, bound, from)
    }
}

/// One thing wrong with one entry of a list.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("entry {} ({provider:?}, {model:?}): {detail}", index + 1)]
pub struct EntryError {
    /// Index of the entry in its list, from 0 (shown from 1).
    pub index: usize,
    /// Its provider, the beginning of it.
    pub provider: String,
    /// Its model, the beginning of it.
    pub model: String,
    /// The field that is wrong.
    pub field: &'static str,
    /// What is wrong, and what would be right.
    pub detail: String,
}

/// Checks every rule that needs no book.
///
/// # Errors
/// Everything that is wrong, not only the first thing, in the order of the list. Two entries of one
/// list for the same key and start must agree: neither is the later knowledge.
pub fn check_entries(entries: &[PriceEntry]) -> Result<(), Vec<EntryError>> {
    let mut errors = Vec::new();
    let error = |index: usize, field, detail| {
        let entry: &PriceEntry = &entries[index];
        let (provider, model) = (excerpt(&entry.provider), excerpt(&entry.model));
        EntryError { index, provider, model, field, detail }
    };
    for (index, entry) in entries.iter().enumerate() {
        entry.check(|field, detail| errors.push(error(index, field, detail)));
    }
    let mut order: Vec<usize> = (0..entries.len()).collect();
    order.sort_by_key(|index| (entries[*index].place(), *index));
    for pair in order.windows(2) {
        let (first, second) = (&entries[pair[0]], &entries[pair[1]]);
        if first.place() == second.place() && first.written() != second.written() {
            let detail =
                format!("other prices than entry {} for the same key and start", pair[0] + 1);
            errors.push(error(pair[1], "effective_from", detail));
        }
    }
    errors.sort_by_key(|error| error.index);
    if errors.is_empty() { Ok(()) } else { Err(errors) }
}

/// Prices written in USD per million tokens.
mod per_million {
    use serde::{Deserializer, Serializer};

    use super::Price;

    pub fn serialize<S: Serializer>(price: &Option<Price>, to: S) -> Result<S::Ok, S::Error> {
        match price {
            Some(price) => to.serialize_str(&price.to_per_million()),
            None => to.serialize_none(),
        }
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Price>, D::Error> {
        super::price(from, Price::per_million)
    }
}

/// Prices written in USD per piece.
mod per_piece {
    use serde::{Deserializer, Serializer};

    use super::Price;

    pub fn serialize<S: Serializer>(price: &Option<Price>, to: S) -> Result<S::Ok, S::Error> {
        match price {
            Some(price) => to.collect_str(&price.get()),
            None => to.serialize_none(),
        }
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Price>, D::Error> {
        super::price(from, Price::per_unit)
    }
}

/// Reads a price that may be null. A bare number is refused: parsers of JSON and TOML hand it over
/// as a float, with its last digits already lost.
fn price<'de, D: serde::Deserializer<'de>>(
    from: D,
    read: fn(&str) -> Result<Price, MoneyError>,
) -> Result<Option<Price>, D::Error> {
    struct Text(fn(&str) -> Result<Price, MoneyError>);

    impl<'de> serde::de::Visitor<'de> for Text {
        type Value = Option<Price>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a price as a decimal string such as \"0.15\"")
        }

        fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Self::Value, E> {
            self.0(text).map(Some).map_err(E::custom)
        }

        fn visit_none<E: serde::de::Error>(self) -> Result<Self::Value, E> {
            Ok(None)
        }

        fn visit_unit<E: serde::de::Error>(self) -> Result<Self::Value, E> {
            Ok(None)
        }

        fn visit_some<D: serde::Deserializer<'de>>(self, from: D) -> Result<Self::Value, D::Error> {
            from.deserialize_str(self)
        }
    }

    from.deserialize_option(Text(read))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry() -> PriceEntry {
        PriceEntry {
            provider: "openai".into(),
            model: "gpt-4o-mini".into(),
            input: Some(Price::per_million("0.15").unwrap()),
            ..PriceEntry::default()
        }
    }

    fn details(entry: PriceEntry) -> Vec<String> {
        let errors = check_entries(&[entry]).err().unwrap_or_default();
        errors.into_iter().map(|error| error.detail).collect()
    }

    #[test]
    fn json_is_the_documented_form_and_comes_back_the_same() {
        let text = r#"{"prices":[{"provider":"openai","model":"gpt-4o-mini","effective_from":"2026-01-15T00:00:00Z","input":"0.15","cached_input":"0.075","output":"0.6","image":"0.04","tier":"flex","min_input_tokens":200000,"org":"acme"},{"provider":"openai","model":"gpt-4o-mini","input":"0"}]}"#;
        let list: PriceList = serde_json::from_str(text).unwrap();
        assert_eq!(list.prices[0].input.unwrap().get(), Atto::new(150_000_000_000));
        assert_eq!(list.prices[0].image.unwrap().get().to_string(), "0.04");
        assert_eq!(serde_json::to_string(&list).unwrap(), text);
    }

    #[test]
    fn null_is_left_out_and_unknown_fields_and_bare_numbers_are_refused() {
        let read = |rest: &str| {
            let text = format!(r#"{{"provider":"p","model":"m",{rest}}}"#);
            serde_json::from_str::<PriceEntry>(&text).map_err(|error| error.to_string())
        };
        assert_eq!(read(r#""org":null,"input":null"#).unwrap().input, None);
        assert!(
            read(r#""input":"1","inputs":"1""#).unwrap_err().contains("unknown field `inputs`")
        );
        assert!(read(r#""input":0.15"#).unwrap_err().contains("decimal string"));
        assert!(read(r#""input":"x""#).unwrap_err().contains("\"x\" is not a decimal number"));
        assert!(read(r#""tier":"fast""#).is_err());
    }

    #[test]
    fn per_million_shifts_digits_only() {
        for text in ["0", "0.15", "15", "1500000", "0.000000000001", "123.000456", "-2.5"] {
            assert_eq!(Price::per_million(text).unwrap().to_per_million(), text);
        }
        assert_eq!(Price::per_million("0.150").unwrap().to_per_million(), "0.15");
        let huge = Price::per_unit("1e19").unwrap();
        assert_eq!(huge.to_per_million(), format!("1{}", "0".repeat(25)));
    }

    #[test]
    fn rounding_is_remembered() {
        let mut rounded = entry();
        rounded.output = Some(Price::per_million("0.0000000000015").unwrap());
        assert_eq!(rounded.rounded(), ["output"]);
        assert_eq!(rounded.output, Some(Price::new(Atto::new(2))));
        assert!(entry().rounded().is_empty());
    }

    #[test]
    fn boundaries_between_slots_are_refused_with_their_neighbours() {
        let mut late = entry();
        late.effective_from = Some(Time::parse("2026-01-15T00:07:00Z").unwrap());
        assert_eq!(
            details(late.clone()),
            ["effective_from 2026-01-15T00:07:00Z lies inside a slot of 15 minutes; the nearest \
              boundaries are 2026-01-15T00:00:00Z and 2026-01-15T00:15:00Z"]
        );
        late.effective_from = Some(Time::parse("2026-01-15T00:15:00Z").unwrap());
        assert!(details(late.clone()).is_empty());
        for outside in ["1969-12-31T00:00:00Z", "2200-01-01T00:00:00Z"] {
            late.effective_from = Some(Time::parse(outside).unwrap());
            assert!(details(late.clone())[0].contains("must lie between"), "{outside}");
        }
    }

    #[test]
    fn other_context_bounds_are_refused() {
        let mut long = entry();
        long.min_input_tokens = 200_000;
        assert!(details(long.clone()).is_empty());
        long.min_input_tokens = 131_072;
        assert_eq!(
            details(long),
            ["min_input_tokens 131072 must be one of \
              0, 32000, 100000, 128000, 200000, 256000, 272000, 512000"]
        );
    }

    #[test]
    fn prices_keep_their_bounds() {
        let mut dear = entry();
        dear.input = Some(Price::per_million("1000000").unwrap());
        dear.image = Some(Price::per_unit("10000").unwrap());
        assert!(details(dear.clone()).is_empty());
        dear.input = Some(Price::per_million("1000000.000000000001").unwrap());
        dear.image = Some(Price::per_unit("10000.01").unwrap());
        dear.output = Some(Price::per_million("-1").unwrap());
        assert_eq!(
            details(dear),
            [
                "input is 1000000.000000000001 USD per million tokens; it must be between 0 and \
                 1000000",
                "output is -1 USD per million tokens; it must be between 0 and 1000000",
                "image is 10000.01 USD a piece; it must be between 0 and 10000",
            ]
        );
    }

    #[test]
    fn names_follow_the_rules_of_events() {
        let mut nameless = entry();
        nameless.provider = String::new();
        nameless.model = "a\nb".into();
        nameless.org = Some("a.b".into());
        let found = details(nameless);
        assert_eq!(found.len(), 3, "{found:?}");
        assert!(found[1].contains("control character"));
    }

    #[test]
    fn a_list_must_not_contradict_itself() {
        let mut other = entry();
        assert!(check_entries(&[entry(), other.clone()]).is_ok());
        other.input = Some(Price::per_million("0.2").unwrap());
        let errors = check_entries(&[entry(), other.clone()]).unwrap_err();
        assert_eq!(
            errors[0].to_string(),
            "entry 2 (\"openai\", \"gpt-4o-mini\"): other prices than entry 1 for the same key and \
             start"
        );
        other.tier = Tier::Batch;
        assert!(check_entries(&[entry(), other]).is_ok());
    }
}
