#[hopline::service]
trait Demo {
    #[rpc(stream)]
    fn primes(&self, upto: u64) -> impl Stream<Item = u64> + Send;
}

fn main() {}
