#[hopline::service(version = 0, foo)]
trait Demo<T> {
    fn put(&mut self, key: &str) -> &str;
    #[rpc(timeout = "soon")]
    async fn new(self, (a, b): (u8, u8));
}

fn main() {}
