//! Names → small numbers, so that rows are small and compared fast.
//!
//! One dictionary a shard, append-only: a number once given is never given again or changed, which
//! makes checkpoints of it a matter of appending. Numbers say which org they belong to: a user, a
//! rate, a label of one org is another number than one of the same name elsewhere, so an org's rows
//! can be found without reading anybody else's.

use std::hash::BuildHasher;

use foldhash::fast::RandomState;
use hashbrown::HashTable;

use crate::event::{ALL_TIERS, Event, METERS, Tier, context_class};
use crate::price_book::RateKey;

/// No entry; ends a list.
pub const NONE: u32 = u32::MAX;

/// A user of an org.
#[derive(Debug, Clone, PartialEq, Eq, bincode::Encode, bincode::Decode)]
pub struct User {
    /// Org number.
    pub org: u32,
    /// Name.
    pub name: Box<str>,
}

/// What decides an event's price, besides its time.
#[derive(Debug, Clone, PartialEq, Eq, bincode::Encode, bincode::Decode)]
pub struct Rate {
    /// Org number.
    pub org: u32,
    /// Symbol of the provider.
    pub provider: u32,
    /// Symbol of the model.
    pub model: u32,
    /// Tier as an index into [`ALL_TIERS`].
    pub tier: u8,
    /// Context class.
    pub context: u8,
    /// Whether the cost came with the event.
    pub reported: bool,
    /// Bit `Meter as usize` for each meter used.
    pub uses: u16,
    /// Number of the (org, model) pair.
    pub org_model: u32,
}

/// What an event was for.
#[derive(Debug, Clone, PartialEq, Eq, bincode::Encode, bincode::Decode)]
pub struct Label {
    /// Org number.
    pub org: u32,
    /// Symbol of the feature.
    pub feature: u32,
    /// Symbols of tag names and values, ascending by name.
    pub tags: Vec<(u32, u32)>,
    /// Number of the (org, feature) pair.
    pub org_feature: u32,
}

/// A model or feature of an org.
#[derive(Debug, Clone, Copy, PartialEq, Eq, bincode::Encode, bincode::Decode)]
pub struct Pair {
    /// Org number.
    pub org: u32,
    /// Symbol of the model or feature.
    pub name: u32,
}

/// Numbers of one event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Numbers {
    /// Org.
    pub org: u32,
    /// User.
    pub user: u32,
    /// Rate.
    pub rate: u32,
    /// Label.
    pub label: u32,
}

/// Everything given a number, in the order of the numbers: what a checkpoint keeps.
#[derive(Debug, Clone, Default, PartialEq, Eq, bincode::Encode, bincode::Decode)]
pub struct Names {
    /// Providers, models, features, tag names and values.
    pub symbols: Vec<Box<str>>,
    /// Orgs.
    pub orgs: Vec<Box<str>>,
    /// Users.
    pub users: Vec<User>,
    /// Rates.
    pub rates: Vec<Rate>,
    /// Labels.
    pub labels: Vec<Label>,
    /// (org, model) pairs.
    pub org_models: Vec<Pair>,
    /// (org, feature) pairs.
    pub org_features: Vec<Pair>,
}

/// How many numbers of each kind there are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Lengths([usize; 7]);

/// The members of an org, by kind, as lists of numbers.
#[derive(Debug, Clone, Default)]
pub struct Members {
    /// Users.
    pub users: Vec<u32>,
    /// Rates.
    pub rates: Vec<u32>,
    /// (org, model) pairs.
    pub models: Vec<u32>,
    /// (org, feature) pairs.
    pub features: Vec<u32>,
}

/// The dictionary of one shard.
#[derive(Debug, Default)]
pub struct Dictionary {
    names: Names,
    members: Vec<Members>,
    hasher: RandomState,
    symbols: HashTable<u32>,
    orgs: HashTable<u32>,
    users: HashTable<u32>,
    rates: HashTable<u32>,
    labels: HashTable<u32>,
    org_models: HashTable<u32>,
    org_features: HashTable<u32>,
}

impl Dictionary {
    /// Everything by number.
    pub fn names(&self) -> &Names {
        &self.names
    }

    /// The members of an org.
    pub fn members(&self, org: u32) -> &Members {
        &self.members[org as usize]
    }

    /// The number of an org, if it was ever seen.
    pub fn org(&self, name: &str) -> Option<u32> {
        let hash = self.hasher.hash_one(name);
        self.orgs.find(hash, |n| *self.names.orgs[*n as usize] == *name).copied()
    }

    /// The number of a user, if ever seen.
    pub fn user(&self, org: u32, name: &str) -> Option<u32> {
        let hash = self.hasher.hash_one((org, name));
        self.users
            .find(hash, |n| {
                let user = &self.names.users[*n as usize];
                user.org == org && *user.name == *name
            })
            .copied()
    }

    /// The text of a symbol.
    pub fn symbol(&self, symbol: u32) -> &str {
        &self.names.symbols[symbol as usize]
    }

    /// The symbol of a text, if ever seen.
    pub fn symbol_of(&self, text: &str) -> Option<u32> {
        let hash = self.hasher.hash_one(text);
        self.symbols.find(hash, |n| *self.names.symbols[*n as usize] == *text).copied()
    }

    /// Name of an org.
    pub fn org_name(&self, org: u32) -> &str {
        &self.names.orgs[org as usize]
    }

    /// What the price book asks to price a rate.
    pub fn rate_key(&self, rate: &Rate) -> RateKey<'_> {
        RateKey {
            org: self.org_name(rate.org),
            provider: self.symbol(rate.provider),
            model: self.symbol(rate.model),
            tier: tier_of(rate),
            context: rate.context,
        }
    }

    /// The numbers of an event that is not a void, given where they are new.
    pub fn number(&mut self, event: &Event<'_>) -> Numbers {
        let org = self.number_org(&event.org);
        Numbers {
            org,
            user: self.number_user(org, &event.user),
            rate: self.number_rate(org, event),
            label: self.number_label(org, event),
        }
    }

    fn number_org(&mut self, name: &str) -> u32 {
        if let Some(org) = self.org(name) {
            return org;
        }
        let org = self.names.orgs.len() as u32;
        self.names.orgs.push(name.into());
        self.members.push(Members::default());
        let (names, hasher) = (&self.names, &self.hasher);
        self.orgs.insert_unique(hasher.hash_one(name), org, |n| {
            hasher.hash_one(&*names.orgs[*n as usize])
        });
        org
    }

    fn number_user(&mut self, org: u32, name: &str) -> u32 {
        if let Some(user) = self.user(org, name) {
            return user;
        }
        let user = self.names.users.len() as u32;
        self.names.users.push(User { org, name: name.into() });
        self.members[org as usize].users.push(user);
        let (names, hasher) = (&self.names, &self.hasher);
        self.users.insert_unique(hasher.hash_one((org, name)), user, |n| {
            let user = &names.users[*n as usize];
            hasher.hash_one((user.org, &*user.name))
        });
        user
    }

    fn number_symbol(&mut self, text: &str) -> u32 {
        if let Some(symbol) = self.symbol_of(text) {
            return symbol;
        }
        let symbol = self.names.symbols.len() as u32;
        self.names.symbols.push(text.into());
        let (names, hasher) = (&self.names, &self.hasher);
        self.symbols.insert_unique(hasher.hash_one(text), symbol, |n| {
            hasher.hash_one(&*names.symbols[*n as usize])
        });
        symbol
    }

    fn number_rate(&mut self, org: u32, event: &Event<'_>) -> u32 {
        let mut uses = 0_u16;
        for meter in 0..METERS {
            uses |= u16::from(event.meters[meter] > 0) << meter;
        }
        let context = context_class(event.input_tokens());
        let (tier, reported) = (event.tier as u8, event.reported());
        let hash_of =
            |hasher: &RandomState, provider: &str, model: &str, org, flags: (u8, u8, bool, u16)| {
                hasher.hash_one((org, flags, provider, model))
            };
        let flags = (tier, context, reported, uses);
        let hash = hash_of(&self.hasher, &event.provider, &event.model, org, flags);
        let names = &self.names;
        let found = self.rates.find(hash, |n| {
            let rate = &names.rates[*n as usize];
            rate.org == org
                && (rate.tier, rate.context, rate.reported, rate.uses) == flags
                && *names.symbols[rate.model as usize] == *event.model
                && *names.symbols[rate.provider as usize] == *event.provider
        });
        if let Some(rate) = found {
            return *rate;
        }
        let provider = self.number_symbol(&event.provider);
        let model = self.number_symbol(&event.model);
        let org_model = self.number_pair(Kind::Model, org, model);
        let number = self.names.rates.len() as u32;
        let rate = Rate { org, provider, model, tier, context, reported, uses, org_model };
        self.names.rates.push(rate);
        self.members[org as usize].rates.push(number);
        let (names, hasher) = (&self.names, &self.hasher);
        self.rates.insert_unique(hash, number, |n| {
            let r = &names.rates[*n as usize];
            let (provider, model) =
                (&names.symbols[r.provider as usize], &names.symbols[r.model as usize]);
            hash_of(hasher, provider, model, r.org, (r.tier, r.context, r.reported, r.uses))
        });
        number
    }

    fn number_label(&mut self, org: u32, event: &Event<'_>) -> u32 {
        let hash = {
            let tags = event.tags.iter().map(|(name, value)| (&**name, &**value));
            label_hash(&self.hasher, org, &event.feature, tags)
        };
        let names = &self.names;
        let symbol = |n: u32| &*names.symbols[n as usize];
        let found =
            self.labels.find(hash, |n| {
                let label = &names.labels[*n as usize];
                label.org == org
                    && *symbol(label.feature) == *event.feature
                    && label.tags.len() == event.tags.len()
                    && label.tags.iter().zip(&event.tags).all(|((name, value), (n, v))| {
                        *symbol(*name) == **n && *symbol(*value) == **v
                    })
            });
        if let Some(label) = found {
            return *label;
        }
        let feature = self.number_symbol(&event.feature);
        let tags = event
            .tags
            .iter()
            .map(|(name, value)| (self.number_symbol(name), self.number_symbol(value)))
            .collect();
        let org_feature = self.number_pair(Kind::Feature, org, feature);
        let number = self.names.labels.len() as u32;
        self.names.labels.push(Label { org, feature, tags, org_feature });
        let (names, hasher) = (&self.names, &self.hasher);
        self.labels.insert_unique(hash, number, |n| label_rehash(hasher, names, *n));
        number
    }

    fn number_pair(&mut self, kind: Kind, org: u32, name: u32) -> u32 {
        let (table, pairs) = match kind {
            Kind::Model => (&mut self.org_models, &mut self.names.org_models),
            Kind::Feature => (&mut self.org_features, &mut self.names.org_features),
        };
        let hash = self.hasher.hash_one((org, name));
        let pair = Pair { org, name };
        if let Some(found) = table.find(hash, |n| pairs[*n as usize] == pair) {
            return *found;
        }
        let number = pairs.len() as u32;
        pairs.push(pair);
        let hasher = &self.hasher;
        table.insert_unique(hash, number, |n| {
            let pair = pairs[*n as usize];
            hasher.hash_one((pair.org, pair.name))
        });
        let members = &mut self.members[org as usize];
        match kind {
            Kind::Model => members.models.push(number),
            Kind::Feature => members.features.push(number),
        }
        number
    }

    /// How many of each there are now; for [`Dictionary::since`].
    pub fn lengths(&self) -> Lengths {
        let n = &self.names;
        Lengths([
            n.symbols.len(),
            n.orgs.len(),
            n.users.len(),
            n.rates.len(),
            n.labels.len(),
            n.org_models.len(),
            n.org_features.len(),
        ])
    }

    /// What was numbered since there were `from`.
    pub fn since(&self, from: Lengths) -> Names {
        let n = &self.names;
        let [symbols, orgs, users, rates, labels, org_models, org_features] = from.0;
        Names {
            symbols: n.symbols[symbols..].to_vec(),
            orgs: n.orgs[orgs..].to_vec(),
            users: n.users[users..].to_vec(),
            rates: n.rates[rates..].to_vec(),
            labels: n.labels[labels..].to_vec(),
            org_models: n.org_models[org_models..].to_vec(),
            org_features: n.org_features[org_features..].to_vec(),
        }
    }

    /// Appends what a checkpoint kept.
    ///
    /// # Errors
    /// When a number refers to one that is not there.
    pub fn restore(&mut self, more: Names) -> Result<(), &'static str> {
        const BROKEN: &str = "a checkpoint's dictionary refers to names it does not have";
        let n = &mut self.names;
        n.symbols.extend(more.symbols);
        n.orgs.extend(more.orgs);
        let (symbols, orgs) = (n.symbols.len() as u32, n.orgs.len() as u32);
        let pairs = |known: usize, new: &[Pair]| -> Result<u32, &'static str> {
            let sound = new.iter().all(|p| p.org < orgs && p.name < symbols);
            if sound { Ok((known + new.len()) as u32) } else { Err(BROKEN) }
        };
        let org_models = pairs(n.org_models.len(), &more.org_models)?;
        let org_features = pairs(n.org_features.len(), &more.org_features)?;
        let sound = more.users.iter().all(|u| u.org < orgs)
            && more.rates.iter().all(|r| {
                r.org < orgs
                    && r.provider < symbols
                    && r.model < symbols
                    && r.org_model < org_models
                    && usize::from(r.tier) < ALL_TIERS.len()
                    && usize::from(r.context) < crate::event::CONTEXT_BOUNDS.len()
            })
            && more.labels.iter().all(|l| {
                l.org < orgs
                    && l.feature < symbols
                    && l.org_feature < org_features
                    && l.tags.iter().all(|(name, value)| *name < symbols && *value < symbols)
            });
        if !sound {
            return Err(BROKEN);
        }
        n.users.extend(more.users);
        n.rates.extend(more.rates);
        n.labels.extend(more.labels);
        n.org_models.extend(more.org_models);
        n.org_features.extend(more.org_features);
        self.index();
        Ok(())
    }

    /// Rebuilds tables and member lists from the names. Linear; used after a restore only.
    fn index(&mut self) {
        let names = &self.names;
        let h = &self.hasher;
        fn fill(len: usize, hash: impl Fn(&u32) -> u64) -> HashTable<u32> {
            let mut table = HashTable::with_capacity(len);
            for n in 0..len as u32 {
                table.insert_unique(hash(&n), n, &hash);
            }
            table
        }
        let pair_hash =
            |pairs: &[Pair], n: &u32| h.hash_one((pairs[*n as usize].org, pairs[*n as usize].name));
        self.symbols = fill(names.symbols.len(), |n| h.hash_one(&*names.symbols[*n as usize]));
        self.orgs = fill(names.orgs.len(), |n| h.hash_one(&*names.orgs[*n as usize]));
        self.users = fill(names.users.len(), |n| {
            let user = &names.users[*n as usize];
            h.hash_one((user.org, &*user.name))
        });
        self.rates = fill(names.rates.len(), |n| {
            let r = &names.rates[*n as usize];
            let (provider, model) =
                (&*names.symbols[r.provider as usize], &*names.symbols[r.model as usize]);
            h.hash_one((r.org, (r.tier, r.context, r.reported, r.uses), provider, model))
        });
        self.labels = fill(names.labels.len(), |n| label_rehash(h, names, *n));
        self.org_models = fill(names.org_models.len(), |n| pair_hash(&names.org_models, n));
        self.org_features = fill(names.org_features.len(), |n| pair_hash(&names.org_features, n));
        let mut members = vec![Members::default(); names.orgs.len()];
        for (n, user) in names.users.iter().enumerate() {
            members[user.org as usize].users.push(n as u32);
        }
        for (n, rate) in names.rates.iter().enumerate() {
            members[rate.org as usize].rates.push(n as u32);
        }
        for (n, pair) in names.org_models.iter().enumerate() {
            members[pair.org as usize].models.push(n as u32);
        }
        for (n, pair) in names.org_features.iter().enumerate() {
            members[pair.org as usize].features.push(n as u32);
        }
        self.members = members;
    }
}

/// The tier of a rate.
pub fn tier_of(rate: &Rate) -> Tier {
    ALL_TIERS[usize::from(rate.tier)]
}

#[derive(Clone, Copy)]
enum Kind {
    Model,
    Feature,
}

fn label_hash<'a>(
    hasher: &RandomState,
    org: u32,
    feature: &str,
    tags: impl Iterator<Item = (&'a str, &'a str)>,
) -> u64 {
    use std::hash::{Hash, Hasher};
    let mut state = hasher.build_hasher();
    (org, feature).hash(&mut state);
    for tag in tags {
        tag.hash(&mut state);
    }
    state.finish()
}

fn label_rehash(hasher: &RandomState, names: &Names, n: u32) -> u64 {
    let label = &names.labels[n as usize];
    let symbol = |n: &u32| &*names.symbols[*n as usize];
    let tags = label.tags.iter().map(|(name, value)| (symbol(name), symbol(value)));
    label_hash(hasher, label.org, symbol(&label.feature), tags)
}
