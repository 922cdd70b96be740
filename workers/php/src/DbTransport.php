<?php

declare(strict_types=1);

namespace Durable\Worker;

/**
 * Tasks as rows of two tables, on Postgres or SQLite. The tables are the engine's.
 *
 * The connection is the transport's own: a handler that used it could be in the middle of a transaction when its task is kept.
 * Give a closure that connects, and it connects again after a failure; given a PDO, it throws ConnectionLost then.
 */
final class DbTransport implements Transport
{
    private const BEAT = 5.0;
    private const TASK_COLUMNS = ['priority', 'token', 'extra', 'kind', 'cancelled_at', 'deliveries', 'refused'];
    private const RESULT_COLUMNS = ['attempt', 'token', 'extra', 'kind'];

    private readonly string $tasks;
    private readonly string $results;
    private readonly string $channels;
    private readonly int $leaseMs;
    private ?\PDO $pdo;
    private bool $postgres = false;
    /** @var array<string, true> columns of tasks beyond those that all know */
    private array $taskColumns = [];
    /** @var array<string, true> the same of results */
    private array $resultColumns = [];
    /** @var list<string> */
    private array $tokens = [];
    /** @var \Closure(string, string): void */
    private \Closure $log;

    /**
     * @param \PDO|\Closure(): \PDO $connect
     * @param string|null $schema of the tables, on Postgres; what the search path finds where there is none
     * @param float $lease seconds a task stays ours without a sign of life: the same for all who use the tables
     * @param float $poll seconds between two looks while nothing was said
     * @param int $maxDeliveries how many workers may take a task and not finish it before it is answered as failed
     */
    public function __construct(
        private readonly \PDO|\Closure $connect,
        string $prefix = 'durable',
        ?string $namespace = null,
        private readonly ?string $schema = null,
        private readonly float $lease = 30.0,
        private readonly float $poll = 1.0,
        private readonly int $maxDeliveries = 3,
    ) {
        if ($lease < 2) {
            throw new \ValueError('A lease has 2 seconds at least: alarms come in whole seconds.');
        }
        $prefix = Names::prefix($prefix, $namespace);
        $in = $schema === null ? '' : self::quoted($schema) . '.';
        $this->tasks = $in . self::quoted(Names::tasksTable($prefix));
        $this->results = $in . self::quoted(Names::resultsTable($prefix));
        $this->channels = substr(hash('sha256', ($schema ?? '') . '.' . Names::tasksTable($prefix)), 0, 16);
        $this->leaseMs = (int) ($lease * 1000);
        $this->pdo = null;
        $this->log = static function (string $level, string $message): void {};
    }

    public function maxMessage(): int
    {
        return (1 << 20) + (256 << 10);
    }

    public function keepEvery(): float
    {
        return min($this->lease / 3, self::BEAT);
    }

    public function open(array $tokens, \Closure $log): void
    {
        $this->tokens = $tokens;
        $this->log = $log;
    }

    public function take(\Closure $stopping): ?Delivery
    {
        try {
            $row = $this->claim();
            if ($row === null) {
                $this->wait();

                return null;
            }
        } catch (\PDOException $error) {
            $this->forget($error);
            throw $error;
        }
        $delivery = new DbDelivery($this, $row);
        if (isset($row['cancelled_at'])) {
            $delivery->drop();

            return null;
        }
        if (($row['deliveries'] ?? 0) > $this->maxDeliveries) {
            $delivery->giveUp();

            return null;
        }

        return $delivery;
    }

    // -- for deliveries

    /** @param array<string, mixed> $row */
    public function keep(array $row): bool
    {
        $cancelled = isset($this->taskColumns['cancelled_at']) ? 'cancelled_at' : 'NULL AS cancelled_at';
        $kept = $this->run(
            "UPDATE {$this->tasks} SET claimed_at = {$this->now()} WHERE step_id = ? AND claimed_by = ? RETURNING $cancelled",
            [$row['step_id'], $row['claimed_by']],
        );

        return $kept !== [] && $kept[0]['cancelled_at'] === null;
    }

    /** @param array<string, mixed> $row */
    public function drop(array $row): void
    {
        $this->run(
            "DELETE FROM {$this->tasks} WHERE step_id = ? AND claimed_by = ?",
            [$row['step_id'], $row['claimed_by']],
        );
    }

    /** @param array<string, mixed> $row */
    public function giveBack(array $row): void
    {
        $less = isset($this->taskColumns['deliveries']) ? ', deliveries = deliveries - 1' : '';
        $this->run(
            "UPDATE {$this->tasks} SET claimed_by = NULL, claimed_at = NULL$less WHERE step_id = ? AND claimed_by = ?",
            [$row['step_id'], $row['claimed_by']],
        );
        if ($this->postgres) {
            $this->run('SELECT pg_notify(?, ?)', ["durable_tasks_{$this->channels}", $row['grp']]);
        }
    }

    /**
     * The result in, the task away, in one transaction.
     *
     * @param array<string, mixed> $row
     */
    public function finish(array $row, Answer $answer): void
    {
        $fields = $answer->fields;
        $put = ['step_id' => $row['step_id'], 'run_id' => $row['run_id'], 'status' => $fields['status']];
        $put += ['attempt' => $row['attempt']];
        if ($answer->isDecision) {
            $put += ['seq' => -1, 'kind' => 'decision', 'extra' => $answer->json()];
        } else {
            $put += [
                'seq' => $row['seq'],
                'started_at' => $fields['startedAt'] ?? null,
                'output' => $answer->output,
                'error' => isset($fields['error']) ? Json::encode($fields['error']) : null,
                'token' => $fields['token'] ?? null,
                'extra' => isset($fields['events']) ? Json::encode(['events' => $fields['events']]) : null,
            ];
        }
        foreach (self::RESULT_COLUMNS as $column) {
            if (!isset($this->resultColumns[$column])) {
                unset($put[$column]);
            }
        }
        $names = array_keys($put);
        $conflict = 'DO NOTHING';
        if (isset($put['attempt'])) {
            $newer = array_map(static fn (string $name): string => "$name = excluded.$name", array_slice($names, 1));
            $conflict = 'DO UPDATE SET ' . implode(', ', $newer)
                . ', created_at = excluded.created_at, claimed_by = NULL, claimed_at = NULL WHERE there.attempt < excluded.attempt';
        }
        $insert = "INSERT INTO {$this->results} AS there (" . implode(', ', $names) . ', created_at) VALUES ('
            . str_repeat('?, ', count($put)) . "{$this->now()}) ON CONFLICT (step_id) $conflict";
        $delete = "DELETE FROM {$this->tasks} WHERE step_id = ? AND claimed_by = ?";
        $mine = [$row['step_id'], $row['claimed_by']];
        if ($this->postgres) {
            $this->run(
                "WITH put AS ($insert), done AS ($delete) SELECT pg_notify(?, '')",
                [...array_values($put), ...$mine, "durable_results_{$this->channels}"],
            );
        } else {
            $this->transaction(function () use ($insert, $put, $delete, $mine): void {
                $this->run($insert, array_values($put));
                $this->run($delete, $mine);
            });
        }
    }

    // -- statements

    /** @return array<string, mixed>|null */
    private function claim(): ?array
    {
        $this->connection();
        $has = $this->taskColumns;
        $claim = bin2hex(random_bytes(16));
        $more = isset($has['deliveries']) ? ', deliveries = coalesce(deliveries, 0) + 1' : '';
        $free = "(claimed_at IS NULL OR claimed_at < {$this->now()} - ?)" . (isset($has['refused']) ? ' AND refused IS NULL' : '');
        $order = (isset($has['priority']) ? 'coalesce(priority, 0) DESC, ' : '') . 'created_at LIMIT 1';
        if ($this->postgres) {
            $array = '{' . implode(',', array_map(
                static fn (string $token): string => '"' . addcslashes($token, '"\\') . '"',
                $this->tokens,
            )) . '}';
            $rows = $this->run(
                "WITH mine AS MATERIALIZED (
                   SELECT step_id FROM {$this->tasks} WHERE grp = ANY(CAST(? AS text[])) AND $free
                    ORDER BY $order FOR UPDATE SKIP LOCKED)
                 UPDATE {$this->tasks} AS task SET claimed_by = ?, claimed_at = {$this->now()}$more
                   FROM mine WHERE task.step_id = mine.step_id RETURNING task.*",
                [$array, $this->leaseMs, $claim],
            );
        } else {
            $groups = implode(', ', array_fill(0, count($this->tokens), '?'));
            $rows = $this->transaction(fn (): array => $this->run(
                "UPDATE {$this->tasks} SET claimed_by = ?, claimed_at = {$this->now()}$more WHERE step_id IN (
                   SELECT step_id FROM {$this->tasks} WHERE grp IN ($groups) AND $free ORDER BY $order)
                 RETURNING *",
                [$claim, ...$this->tokens, $this->leaseMs],
            ));
        }

        return $rows[0] ?? null;
    }

    /** Until something may be there. A signal ends it early. */
    private function wait(): void
    {
        if (!$this->postgres) {
            usleep((int) ($this->poll * 1e6));

            return;
        }
        $pdo = $this->connection();
        $ms = (int) ($this->poll * 1000);
        // News of other groups too; what several notifications say is one look.
        // @phpstan-ignore-next-line the one is PHP 8.4's, the other deprecated there
        $next = static fn (int $most) => method_exists($pdo, 'getNotify') ? $pdo->getNotify(\PDO::FETCH_NUM, $most)
            : $pdo->pgsqlGetNotify(\PDO::FETCH_NUM, $most);
        if ($next($ms) !== false) {
            while ($next(0) !== false) {
                continue;
            }
        }
    }

    /** By the server's clock where there is one. */
    private function now(): string
    {
        return $this->postgres ? '(extract(epoch FROM clock_timestamp()) * 1000)::bigint' : (string) (int) (microtime(true) * 1000);
    }

    /**
     * @param list<mixed> $values
     *
     * @return list<array<string, mixed>>
     */
    private function run(string $sql, array $values): array
    {
        // On Postgres in one go, with nothing prepared, which a pooler between might not know of.
        $options = $this->postgres ? [self::unprepared() => true] : [];
        $statement = $this->connection()->prepare($sql, $options);
        foreach ($values as $index => $value) {
            $kind = match (true) {
                $value === null => \PDO::PARAM_NULL,
                is_int($value) => \PDO::PARAM_INT,
                default => \PDO::PARAM_STR,
            };
            $statement->bindValue($index + 1, $value, $kind);
        }
        $statement->execute();
        /** @var list<array<string, mixed>> $rows */
        $rows = $statement->columnCount() > 0 ? $statement->fetchAll(\PDO::FETCH_ASSOC) : [];

        return $rows;
    }

    /**
     * SQLite's, which takes the lock for writing at once.
     *
     * @template T
     *
     * @param \Closure(): T $body
     *
     * @return T
     */
    private function transaction(\Closure $body): mixed
    {
        $pdo = $this->connection();
        $pdo->exec('BEGIN IMMEDIATE');
        try {
            $result = $body();
            $pdo->exec('COMMIT');

            return $result;
        } catch (\Throwable $error) {
            try {
                $pdo->exec('ROLLBACK');
            } catch (\PDOException) {
                // it has ended by itself
            }
            throw $error;
        }
    }

    // -- the connection

    private function connection(): \PDO
    {
        if ($this->pdo !== null) {
            return $this->pdo;
        }
        $pdo = $this->connect instanceof \PDO ? $this->connect : ($this->connect)();
        $pdo->setAttribute(\PDO::ATTR_ERRMODE, \PDO::ERRMODE_EXCEPTION);
        $pdo->setAttribute(\PDO::ATTR_STRINGIFY_FETCHES, false);
        $driver = $pdo->getAttribute(\PDO::ATTR_DRIVER_NAME);
        if ($driver !== 'pgsql' && $driver !== 'sqlite') {
            throw new \ValueError("Rows are on Postgres or SQLite, not on $driver.");
        }
        $this->postgres = $driver === 'pgsql';
        $this->pdo = $pdo;
        try {
            if ($this->postgres) {
                $pdo->exec("LISTEN durable_tasks_{$this->channels}");
            } else {
                $pdo->exec('PRAGMA busy_timeout = 5000');
            }
            $this->taskColumns = $this->columns($this->tasks, self::TASK_COLUMNS);
            $this->resultColumns = $this->columns($this->results, self::RESULT_COLUMNS);
        } catch (\Throwable $error) {
            $this->pdo = null;
            throw $error;
        }

        return $pdo;
    }

    /**
     * @param list<string> $wanted
     *
     * @return array<string, true>
     */
    private function columns(string $table, array $wanted): array
    {
        $rows = $this->postgres
            ? $this->run('SELECT attname AS name FROM pg_attribute
                           WHERE attrelid = to_regclass(?) AND attnum > 0 AND NOT attisdropped', [$table])
            : $this->run('SELECT name FROM pragma_table_info(?)', [str_replace('""', '"', trim($table, '"'))]);
        $there = array_column($rows, 'name');
        if ($there === []) {
            throw new \RuntimeException("There is no table $table: an engine makes it, or check prefix and schema.");
        }

        return array_fill_keys(array_intersect($wanted, $there), true);
    }

    /** After an error: another connection, unless it is only the statement that failed. */
    private function forget(\PDOException $error): void
    {
        try {
            $this->pdo?->query('SELECT 1');

            return;
        } catch (\PDOException) {
            $this->pdo = null;
        }
        if ($this->connect instanceof \PDO) {
            throw new ConnectionLost("The database is gone: {$error->getMessage()}", 0, $error);
        }
    }

    /**
     * What a delivery asks, with another connection the next time where this one is gone.
     *
     * @template T
     *
     * @param \Closure(): T $body
     *
     * @return T
     */
    public function asking(\Closure $body): mixed
    {
        try {
            return $body();
        } catch (\PDOException $error) {
            $this->forget($error);
            throw $error;
        }
    }

    /** PHP 8.4 has another name for it, and 8.5 complains of the old one. */
    private static function unprepared(): int
    {
        $name = class_exists('Pdo\Pgsql', false) ? 'Pdo\Pgsql::ATTR_DISABLE_PREPARES' : 'PDO::PGSQL_ATTR_DISABLE_PREPARES';
        $value = constant($name);
        assert(is_int($value));

        return $value;
    }

    private static function quoted(string $name): string
    {
        return '"' . str_replace('"', '""', $name) . '"';
    }
}
