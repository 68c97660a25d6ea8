//! The network between one node and the servers: a port in front of each server that can be cut, so
//! that bytes go nowhere and connections stay as they are, or slowed down.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// What is wrong with a network.
#[derive(Default)]
struct Trouble {
    cut: AtomicBool,
    delay_us: AtomicU64,
    over: AtomicBool,
}

/// A node's network.
pub struct Network {
    trouble: Arc<Trouble>,
    ports: Vec<u16>,
    listening: Vec<JoinHandle<()>>,
}

impl Network {
    /// A way to each of these ports.
    pub fn to(servers: &[u16]) -> Network {
        let trouble = Arc::new(Trouble::default());
        let mut network = Network { trouble, ports: Vec::new(), listening: Vec::new() };
        for server in servers {
            let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
            network.ports.push(listener.local_addr().unwrap().port());
            let (trouble, server) = (network.trouble.clone(), *server);
            let listen = move || {
                for client in listener.incoming().flatten() {
                    if trouble.over.load(Ordering::SeqCst) {
                        return;
                    }
                    // A server that is down refuses; so does the way to it.
                    let Ok(server) = TcpStream::connect(("127.0.0.1", server)) else { continue };
                    carry(client.try_clone().unwrap(), server.try_clone().unwrap(), &trouble);
                    carry(server, client, &trouble);
                }
            };
            network.listening.push(std::thread::spawn(listen));
        }
        network
    }

    /// Addresses of the servers by this network, separated by commas.
    pub fn url(&self) -> String {
        let urls = self.ports.iter().map(|port| format!("nats://127.0.0.1:{port}"));
        urls.collect::<Vec<_>>().join(",")
    }

    /// Cuts it, or mends it. What was sent meanwhile arrives then.
    pub fn cut(&self, cut: bool) {
        self.trouble.cut.store(cut, Ordering::SeqCst);
    }

    /// Delays what is sent, in each direction.
    pub fn delay(&self, delay: Duration) {
        self.trouble.delay_us.store(delay.as_micros() as u64, Ordering::SeqCst);
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        self.trouble.over.store(true, Ordering::SeqCst);
        for port in &self.ports {
            // Wakes the listener, which sees that it is over.
            drop(TcpStream::connect(("127.0.0.1", *port)));
        }
        for listening in self.listening.drain(..) {
            listening.join().unwrap();
        }
    }
}

/// Carries bytes one way until either end is gone.
fn carry(mut from: TcpStream, mut to: TcpStream, trouble: &Arc<Trouble>) {
    let trouble = trouble.clone();
    from.set_nodelay(true).unwrap();
    // A detached thread: it ends with its connection.
    std::thread::spawn(move || {
        let mut bytes = vec![0; 64 * 1024];
        while let Ok(n) = from.read(&mut bytes) {
            while trouble.cut.load(Ordering::SeqCst) && !trouble.over.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(1));
            }
            std::thread::sleep(Duration::from_micros(trouble.delay_us.load(Ordering::SeqCst)));
            if n == 0 || to.write_all(&bytes[..n]).is_err() {
                break;
            }
        }
        // The other direction ends by these.
        drop(from.shutdown(Shutdown::Both));
        drop(to.shutdown(Shutdown::Both));
    });
}
