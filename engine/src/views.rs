//! The read side of one shard: answers from the views where they have them, from the usage
//! arrangement where not. Called between epochs, when all that is visible is committed.

use std::collections::{BTreeMap, BTreeSet};

use differential_dataflow::difference::Multiply;
use meterr_connectors::api::{
    GroupBy, OrgEffect, SpendQuery, SpendRow, TopBy, TopQuery, TopRow, UnpricedRow, Window,
};
use meterr_operators::control::{Dimension, WindowSize};
use meterr_operators::dataflow::{Shared, price_at};
use meterr_operators::dictionary::tier_of;
use meterr_operators::event::{CONTEXT_BOUNDS, Meter};
use meterr_operators::money::Atto;
use meterr_operators::price_book::{PriceBook, PriceEntry};
use meterr_operators::rollup::{View, value_of, window_of};
use meterr_operators::shard::Shard;
use meterr_operators::time::{Slot, Time};
use meterr_operators::usage::Spend;
use meterr_operators::window::{Zone, hour_instant};

use crate::wire::{Size, Starts, figures};

/// Rows of an org, keyed by window number and key.
type Groups = BTreeMap<(u32, Option<String>), Spend>;

/// Spend of an org or user.
pub fn spend(shard: &mut Shard, query: &SpendQuery) -> Vec<SpendRow> {
    let Some(org) = shard.flow().shared().borrow().names.org(&query.org) else {
        return Vec::new();
    };
    let user = match &query.user {
        None => None,
        Some(name) => match shard.flow().shared().borrow().names.user(org, name) {
            None => return Vec::new(),
            user => user,
        },
    };
    let groups = from_views(&shard.flow().shared().borrow(), org, user, query);
    let groups = match groups {
        Some(groups) => groups,
        None => from_usage(shard, org, user, query),
    };
    rows(&shard.flow().shared().borrow(), org, query, groups)
}

fn rows(shared: &Shared, org: u32, query: &SpendQuery, groups: Groups) -> Vec<SpendRow> {
    let zone_at = shared.zone_of(org);
    let zone = &shared.zones[zone_at as usize];
    let mut starts = Starts::default();
    let size = size(query.window);
    groups
        .into_iter()
        .filter(|((window, _), spend)| {
            !spend.is_nothing() && in_range(query, instant(query.window, zone, *window))
        })
        .map(|((window, key), spend)| SpendRow {
            window_start: starts.of(size, zone_at, zone, window).map(str::to_owned),
            key,
            figures: figures(&spend),
        })
        .collect()
}

fn size(window: Window) -> Size {
    match window {
        Window::Hour => Size::Hour,
        Window::Day => Size::Day,
        Window::Month => Size::Month,
        Window::All => Size::All,
    }
}

fn window_size(window: Window) -> WindowSize {
    match window {
        Window::Hour => WindowSize::Hour,
        Window::Day => WindowSize::Day,
        Window::Month => WindowSize::Month,
        Window::All => WindowSize::All,
    }
}

/// The instant a window begins; `None` for all time.
fn instant(window: Window, zone: &Zone, number: u32) -> Option<Time> {
    match window {
        Window::Hour => Some(hour_instant(number)),
        Window::Day => Some(zone.day_instant(number)),
        Window::Month => Some(zone.month_instant(number)),
        Window::All => None,
    }
}

fn in_range(query: &SpendQuery, start: Option<Time>) -> bool {
    let Some(start) = start else { return true };
    query.from.is_none_or(|from| start >= from) && query.to.is_none_or(|to| start < to)
}

/// The answer from the views kept live, if they have it.
fn from_views(shared: &Shared, org: u32, user: Option<u32>, query: &SpendQuery) -> Option<Groups> {
    let members = shared.names.members(org);
    let itself = [org];
    let one_user = user.map(|user| [user]);
    let (view, list): (View, &[u32]) = match (&query.by, query.window, &one_user) {
        (GroupBy::None, Window::Hour, None) => (View::OrgHour, &itself),
        (GroupBy::None, Window::Day, None) => (View::OrgDay, &itself),
        (GroupBy::None, Window::Month, None) => (View::OrgMonth, &itself),
        (GroupBy::None, Window::All, None) => (View::OrgAll, &itself),
        (GroupBy::None | GroupBy::User, Window::Day, Some(user)) => (View::UserDay, user),
        (GroupBy::None | GroupBy::User, Window::Month, Some(user)) => (View::UserMonth, user),
        (GroupBy::User, Window::Day, None) => (View::UserDay, &members.users),
        (GroupBy::User, Window::Month, None) => (View::UserMonth, &members.users),
        (GroupBy::Model, Window::Day, None) => (View::ModelDay, &members.models),
        (GroupBy::Model, Window::Month, None) => (View::ModelMonth, &members.models),
        (GroupBy::Feature, Window::Day, None) => (View::FeatureDay, &members.features),
        (GroupBy::Feature, Window::Month, None) => (View::FeatureMonth, &members.features),
        _ => return None,
    };
    if !shared.rollup.set().has(view) {
        return None;
    }
    let mut groups = Groups::new();
    for member in list {
        let key = match query.by {
            GroupBy::None => None,
            _ => crate::wire::key_of(shared, view, *member).map(str::to_owned),
        };
        for (window, spend) in shared.rollup.table(view).of_member(*member) {
            groups.insert((window, key.clone()), spend.clone());
        }
    }
    Some(groups)
}

/// The answer from the usage itself: any grouping, any window.
fn from_usage(shard: &mut Shard, org: u32, user: Option<u32>, query: &SpendQuery) -> Groups {
    let dimension = match &query.by {
        GroupBy::None => None,
        GroupBy::User => Some(Dimension::User),
        GroupBy::Model => Some(Dimension::Model),
        GroupBy::Provider => Some(Dimension::Provider),
        GroupBy::Feature => Some(Dimension::Feature),
        GroupBy::Tag(name) => Some(Dimension::Tag(name.clone())),
    };
    let size = window_size(query.window);
    let mut groups = Groups::new();
    visit_org(shard, org, |shared, key, spend| {
        if user.is_some_and(|user| user != key.user) {
            return;
        }
        let zone = &shared.zones[shared.zone_of(org) as usize];
        let window = window_of(size, Slot(key.slot), zone);
        let value = dimension
            .as_ref()
            .map(|d| value_of(d, &shared.names, key.rate, key.user, key.label).to_owned());
        groups.entry((window, value)).or_default().add(&spend);
    });
    groups
}

/// Visits the priced usage rows of an org.
fn visit_org(
    shard: &mut Shard,
    org: u32,
    mut visit: impl FnMut(&Shared, &meterr_operators::dataflow::UsageKey, Spend),
) {
    let shared = shard.flow().shared().clone();
    let rates = shared.borrow().names.members(org).rates.clone();
    for rate in rates {
        let prices = shared.borrow_mut().prices_of(rate);
        let names = shared.borrow();
        shard.flow_mut().visit([rate], Slot::MIN, Slot(u32::MAX), |key, usage| {
            visit(&names, key, usage.multiply(price_at(&prices, Slot(key.slot))));
        });
    }
}

/// Rows of a declared view for one org; `None` when there is no such view.
pub fn declared(shard: &Shard, name: &str, query: &SpendQuery) -> Option<Vec<SpendRow>> {
    let shared = shard.flow().shared().borrow();
    let view = shared.rollup.declared.iter().flatten().find(|view| view.name == name)?;
    let Some(org) = shared.names.org(&query.org) else { return Some(Vec::new()) };
    let mut groups = Groups::new();
    for (member, (of_org, values)) in view.members.iter().enumerate() {
        if *of_org != org {
            continue;
        }
        let key = serde_json::to_string(values).unwrap_or_default();
        for (window, spend) in view.table.of_member(member as u32) {
            groups.insert((window, Some(key.clone())), spend.clone());
        }
    }
    let window = match view.window {
        WindowSize::Hour => Window::Hour,
        WindowSize::Day => Window::Day,
        WindowSize::Month => Window::Month,
        WindowSize::All => Window::All,
    };
    let query = SpendQuery { window, ..query.clone() };
    Some(rows(&shared, org, &query, groups))
}

/// A row of a shard's share of a top list: org, name and spend.
pub type Share = (Option<String>, String, Spend);

/// A shard's share of a top list: every row with spend in the window. Users and orgs live in one
/// shard; models and features are added up over shards by the caller, so none may be left out here.
pub fn top(shard: &mut Shard, query: &TopQuery) -> Vec<Share> {
    let at = query.at.unwrap_or(shard.log_time()).slot();
    let shared = shard.flow().shared().clone();
    let orgs: Vec<u32> = {
        let shared = shared.borrow();
        match &query.org {
            Some(name) => shared.names.org(name).into_iter().collect(),
            None => (0..shared.names.names().orgs.len() as u32).collect(),
        }
    };
    let mut sums: BTreeMap<(Option<String>, String), Spend> = BTreeMap::new();
    for org in orgs {
        let (window, start, name) = {
            let shared = shared.borrow();
            let zone = &shared.zones[shared.zone_of(org) as usize];
            let window = window_of(window_size(query.window), at, zone);
            (window, instant(query.window, zone, window), shared.names.org_name(org).to_owned())
        };
        let by = match query.by {
            TopBy::Org => GroupBy::None,
            TopBy::User => GroupBy::User,
            TopBy::Model => GroupBy::Model,
            TopBy::Feature => GroupBy::Feature,
        };
        let spend = SpendQuery {
            org: name.clone(),
            user: None,
            window: query.window,
            from: start,
            to: None,
            by,
            min_position: None,
        };
        let groups = from_views(&shared.borrow(), org, None, &spend);
        let groups = groups.unwrap_or_else(|| from_usage(shard, org, None, &spend));
        for ((of, key), spend) in groups {
            if of != window {
                continue;
            }
            let key = match query.by {
                TopBy::Org => (Some(name.clone()), name.clone()),
                TopBy::User => (Some(name.clone()), key.unwrap_or_default()),
                TopBy::Model | TopBy::Feature => (None, key.unwrap_or_default()),
            };
            sums.entry(key).or_default().add(&spend);
        }
    }
    sums.into_iter()
        .filter(|(_, spend)| !spend.is_nothing())
        .map(|((org, key), spend)| (org, key, spend))
        .collect()
}

/// Of a shard's share of a top list, what may be among the first: an org and its users are in one shard
/// only, so of those the shard's own first ones.
pub fn foremost(mut share: Vec<Share>, query: &TopQuery) -> Vec<Share> {
    if matches!(query.by, TopBy::Org | TopBy::User) && share.len() > query.n {
        // Stable: names are ascending already.
        share.sort_by_key(|(_, _, spend)| std::cmp::Reverse(spend.cost));
        share.truncate(query.n);
    }
    share
}

/// Adds up shards' shares and keeps the `n` largest by cost, then by name.
pub fn merge_top(shares: Vec<Vec<Share>>, n: usize) -> Vec<TopRow> {
    let mut sums: BTreeMap<(Option<String>, String), Spend> = BTreeMap::new();
    for (org, key, spend) in shares.into_iter().flatten() {
        sums.entry((org, key)).or_default().add(&spend);
    }
    let mut rows: Vec<_> = sums.into_iter().collect();
    // Stable: names are ascending already.
    rows.sort_by_key(|(_, spend)| std::cmp::Reverse(spend.cost));
    rows.truncate(n);
    rows.into_iter()
        .map(|((org, key), spend)| TopRow { org, key, figures: figures(&spend) })
        .collect()
}

/// What lacks a price: provider, model, tier, lower bound of the input size, kinds of units.
type Lacking = (String, String, &'static str, u64, Vec<String>);

/// Usage of an org that lacks a price.
pub fn unpriced(shard: &mut Shard, org: &str) -> Vec<UnpricedRow> {
    let Some(org) = shard.flow().shared().borrow().names.org(org) else { return Vec::new() };
    let mut found: BTreeMap<u32, (u32, u32, i64)> = BTreeMap::new();
    visit_org(shard, org, |_, key, spend| {
        if spend.unpriced() != 0 {
            let row = found.entry(key.rate).or_insert((key.slot, key.slot, 0));
            *row = (row.0.min(key.slot), row.1.max(key.slot), row.2 + spend.unpriced());
        }
    });
    let shared = shard.flow().shared().borrow();
    let mut rows: BTreeMap<Lacking, (u32, u32, i64)> = BTreeMap::new();
    for (rate, (first, last, events)) in found {
        let rate = &shared.names.names().rates[rate as usize];
        let key = shared.names.rate_key(rate);
        let prices = shared.book.at(&key, Slot(last));
        let lacks = |meter: Meter| {
            let price = prices.and_then(|prices| prices.get(meter));
            rate.uses & (1 << meter as usize) != 0 && price.is_none()
        };
        use Meter::*;
        let lacking = [
            ("input", vec![Input, CacheRead, CacheWrite, CacheWrite1h]),
            ("output", vec![Output, Reasoning]),
            ("audio_input", vec![AudioInput]),
            ("audio_output", vec![AudioOutput]),
            ("image", vec![Images]),
            ("search", vec![Searches]),
        ];
        let lacking = lacking
            .into_iter()
            .filter(|(_, meters)| meters.iter().any(|m| lacks(*m)))
            .map(|(name, _)| name.to_owned())
            .collect();
        let bound = CONTEXT_BOUNDS[usize::from(rate.context)];
        let (provider, model) = (key.provider.to_owned(), key.model.to_owned());
        let row = rows
            .entry((provider, model, tier_of(rate).name(), bound, lacking))
            .or_insert((first, last, 0));
        *row = (row.0.min(first), row.1.max(last), row.2 + events);
    }
    rows.into_iter()
        .map(|((provider, model, tier, min_input_tokens, lacking), (first, last, events))| {
            UnpricedRow {
                provider,
                model,
                tier: tier.to_owned(),
                min_input_tokens,
                lacking,
                first: Slot(first).start(),
                last: Slot(last).start(),
                events,
            }
        })
        .collect()
}

/// What new price entries would change in this shard, by org.
///
/// # Errors
/// What is wrong with the entries.
pub fn preview(shard: &mut Shard, entries: &[PriceEntry]) -> Result<Vec<OrgEffect>, String> {
    let mut book: PriceBook = shard.flow().shared().borrow().book.clone();
    let touched = book
        .apply(entries, u64::MAX)
        .map_err(|errors| errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))?;
    let mut effects: BTreeMap<u32, OrgEffect> = BTreeMap::new();
    let repricings = shard.flow().repricings(&book, &touched);
    let shared = shard.flow().shared().clone();
    let mut rates = BTreeSet::new();
    for change in repricings {
        rates.insert(change.rate);
        let prices = shared.borrow_mut().prices_of(change.rate);
        let org = shared.borrow().names.names().rates[change.rate as usize].org;
        let effect = effects.entry(org).or_insert_with(|| OrgEffect {
            org: shared.borrow().names.org_name(org).to_owned(),
            events: 0,
            cost_before: Atto::ZERO,
            cost_after: Atto::ZERO,
        });
        shard.flow_mut().visit([change.rate], change.from, change.to, |key, usage| {
            let before = usage.multiply(price_at(&prices, Slot(key.slot))).cost;
            effect.events += usage.events;
            effect.cost_before += before;
            effect.cost_after += before + usage.multiply(&change.delta).cost;
        });
    }
    Ok(effects.into_values().filter(|effect| effect.events != 0).collect())
}
