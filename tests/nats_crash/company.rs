//! Everybody who works with the deployment while things happen to it: publishers, an administrator,
//! watchers and followers of every org, a reader of every output log. In the end what they know must be
//! what the servers say.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use meterr_operators::ids::shard_of;

use crate::administrator::administer;
use crate::follower::{self, Goals};
use crate::model::{Model, ORGS};
use crate::publisher::{self, Sent};
use crate::reader::{self, Believed};
use crate::seen::Seen;
use crate::stage::Stage;
use crate::support::Server;
use crate::watcher::{self, Watcher};
use crate::{SHARDS, control_position};

/// A plain client that waits for the servers and comes back by itself.
pub async fn connect(url: &str) -> async_nats::Client {
    let addresses: Vec<async_nats::ServerAddr> =
        url.split(',').map(|address| address.parse().unwrap()).collect();
    async_nats::ConnectOptions::new()
        .retry_on_initial_connect()
        .reconnect_delay_callback(|_| Duration::from_millis(10))
        .request_timeout(Some(Duration::from_secs(1)))
        .connect(addresses)
        .await
        .unwrap()
}

/// Runs on a thread and a runtime of its own.
fn task<T: Send + 'static, F: Future<Output = T>>(
    work: impl FnOnce() -> F + Send + 'static,
) -> JoinHandle<T> {
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(work())
    })
}

/// All of them at work.
pub struct Company {
    url: String,
    stage: Arc<Stage>,
    sent: Arc<Mutex<Sent>>,
    changes: Arc<Mutex<Model>>,
    publishers: Vec<JoinHandle<()>>,
    administrator: JoinHandle<u64>,
    watchers: Vec<JoinHandle<Watcher>>,
    goals: Arc<Goals>,
    followers: Vec<JoinHandle<Seen>>,
    readers: Vec<JoinHandle<Believed>>,
}

impl Company {
    /// Begins, on streams that are there.
    pub fn begin(url: &str, seed: u64, stage: &Arc<Stage>, sent: &Arc<Mutex<Sent>>) -> Company {
        let (url, stage, sent) = (url.to_owned(), stage.clone(), sent.clone());
        let publish = |n| {
            let (url, stage, sent) = (url.clone(), stage.clone(), sent.clone());
            task(move || async move { publisher::publish(n, seed, &url, &stage, &sent).await })
        };
        let publishers = (0..3).map(publish).collect();
        let changes = Arc::new(Mutex::new(Model::default()));
        let administrator = {
            let (stage, changes) = (stage.clone(), changes.clone());
            std::thread::spawn(move || administer(seed, &stage, &changes))
        };
        let watch = |org: &&'static str| {
            let (org, url, stage) = (*org, url.clone(), stage.clone());
            task(move || async move { watcher::watch(org, &url, &stage).await })
        };
        let watchers = ORGS.iter().map(watch).collect();
        let goals = Arc::new(Goals::default());
        let follow = |org: &&'static str| {
            let (org, url, goals) = (*org, url.clone(), goals.clone());
            task(move || async move { follower::follow(org, &url, &goals).await })
        };
        let followers = ORGS.iter().map(follow).collect();
        let read = |shard| {
            let (url, stage) = (url.clone(), stage.clone());
            task(move || async move { reader::read(shard, &url, &stage).await })
        };
        let readers = (0..SHARDS).map(read).collect();
        Company {
            url,
            stage,
            sent,
            changes,
            publishers,
            administrator,
            watchers,
            goals,
            followers,
            readers,
        }
    }

    /// Lets everybody finish, and compares: all views of each of `servers` with what was acknowledged, also
    /// after everything is sent once more; what each subscriber saw with the output logs. At least so
    /// many lines must have been acknowledged; `told` says what was done. Returns the events counted.
    pub fn finish(self, servers: &[&Server], least: u64, told: &str) -> u64 {
        self.stage.closing.store(true, Ordering::SeqCst);
        self.publishers.into_iter().for_each(|publisher| publisher.join().unwrap());
        let changed = self.administrator.join().unwrap();
        let changes = Arc::into_inner(self.changes).unwrap().into_inner().unwrap();
        let (model, position, lines) = {
            let mut sent = self.sent.lock().unwrap();
            sent.model.prices = changes.prices;
            sent.model.zones = changes.zones;
            println!(
                "{} lines, {} messages sent again, {} of them known to the server, {changed} changes of \
                 prices and zones; {told}",
                sent.lines, sent.repeated, sent.known
            );
            (std::mem::take(&mut sent.model), sent.position(), sent.lines)
        };
        assert!(lines > least && changed > 0, "too little happened: {lines} lines");
        let position = format!("{position},{}", control_position(servers[0]));
        servers.iter().for_each(|server| model.check(server, &position));

        // Everything once more: nothing may change.
        let again = Arc::new(Mutex::new(Sent::default()));
        let everything: Vec<_> =
            model.events.iter().map(|((_, id), version)| (id.clone(), version.clone())).collect();
        let (url, sent) = (self.url.clone(), again.clone());
        let repeating =
            task(move || async move { publisher::repeat(&url, &everything, &sent).await });
        repeating.join().unwrap();
        let position = again.lock().unwrap().position();
        servers.iter().for_each(|server| model.check(server, &position));

        self.stage.over.store(true, Ordering::SeqCst);
        let believed: Vec<Believed> =
            self.readers.into_iter().map(|reader| reader.join().unwrap()).collect();
        let last = |(org, epochs): (&String, &Vec<u64>)| (org.clone(), *epochs.last().unwrap());
        let all: BTreeMap<_, _> =
            believed.iter().flat_map(|believed| &believed.epochs).map(last).collect();
        *self.goals.lock().unwrap() = Some(all);
        for ((watcher, follower), org) in self.watchers.into_iter().zip(self.followers).zip(ORGS) {
            let (watcher, follower) = (watcher.join().unwrap(), follower.join().unwrap());
            let of = self.url.clone();
            let snapshot = task(move || async move { watcher::snapshot(&of, org).await });
            let snapshot = snapshot.join().unwrap();
            let believed = &believed[usize::from(shard_of(org, SHARDS).0)];
            println!(
                "{org}: {} changes, {} of them live, {} questions; its shard: {} commits, {} take-overs, \
                 {} parts without a commit",
                watcher.seen.epochs.len(),
                watcher.live,
                watcher.asked,
                believed.commits,
                believed.seals,
                believed.disbelieved
            );
            watcher.seen.check("watcher", &snapshot, believed);
            follower.check("follower", &snapshot, believed);
            assert!(watcher.live > 0 && watcher.asked > 1, "{org}: one way was never used");
        }
        model.events_counted()
    }
}
