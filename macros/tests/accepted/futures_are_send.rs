//! What a method returns can be moved to another thread, for any implementation.
#![deny(warnings)]

#[hopline::service]
trait Counter {
    async fn count(&self, by: u64) -> u64;
    async fn twice(&self, by: u64) -> u64 {
        self.count(by).await + self.count(by).await
    }
}

fn spawn<F: Future + Send + 'static>(_: F) {}

fn count<T: Counter + Send + Sync + 'static>(counter: T) {
    spawn(async move { counter.count(1).await + counter.twice(1).await });
}

struct One;

impl Counter for One {
    async fn count(&self, by: u64) -> u64 {
        std::future::ready(by).await
    }
}

fn main() {
    count(One);
    let _ = CounterServer::new(One);
}
